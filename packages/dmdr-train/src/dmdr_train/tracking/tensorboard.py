"""TensorBoard: event files in the folder `tensorboard/` of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmdr_train.recipe.fields import Section
from dmdr_train.recipe.schema import Recipe
from dmdr_train.tracking.tracker import Tracker, series


class TensorBoard(Tracker):
    """Writes TensorBoard's event files."""

    class Options(Section):
        """TensorBoard has no options."""

    def __init__(self, folder: Path, recipe: Recipe, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self.writer.add_image(series(step, name), np.asarray(image), step, dataformats="HWC")

    def warn(self, step: int, text: str) -> None:
        self.writer.add_text("watch/alarm", text, step)

    def close(self) -> None:
        self.writer.close()
