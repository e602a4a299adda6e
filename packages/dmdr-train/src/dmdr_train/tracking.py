"""Where a run writes what it measures: metrics.jsonl, TensorBoard, W&B and the progress bar. Rank 0 alone has one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dmdr_train import recipe


class Tracker:
    """One line of JSON per logged step, and the same to the trackers that the recipe names.

    After a resume, lines of steps that will be made again are dropped first.
    """

    def __init__(self, folder: Path, settings: recipe.Recipe, start: int):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [
                line for line in self.path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= start
            ]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.bar = tqdm(total=settings.run.steps, initial=start, unit="step", dynamic_ncols=True)
        self.tensorboard: Any = None
        if settings.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.wandb: Any = None
        if settings.tracking.wandb:
            import wandb

            self.wandb = wandb.init(
                project=settings.tracking.wandb, dir=str(folder), config=settings.model_dump(mode="json")
            )

    def advance(self) -> None:
        self.bar.update()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        shown = {k.partition("/")[2]: f"{v:.3g}" for k, v in values.items() if k.startswith(("loss/", "reward/"))}
        self.bar.set_postfix(shown)
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        if self.tensorboard:
            self.tensorboard.add_image(name, np.asarray(image), step, dataformats="HWC")
        if self.wandb:
            import wandb

            self.wandb.log({name: wandb.Image(image)}, step=step)

    def warn(self, step: int, text: str) -> None:
        """An alarm of early warning."""
        self.say(text)
        if self.tensorboard:
            self.tensorboard.add_text("watch/alarm", text, step)
        if self.wandb:
            self.wandb.alert(title="early warning", text=text)

    def say(self, text: str) -> None:
        self.bar.write(text)

    def close(self) -> None:
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl; empty if there is none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
