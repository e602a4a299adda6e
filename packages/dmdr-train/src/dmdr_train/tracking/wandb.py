"""Weights & Biases, with its offline mode if the server cannot be reached; `wandb sync` sends such a run later."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import model_validator

from dmdr_train.recipe.fields import Section
from dmdr_train.recipe.schema import Recipe
from dmdr_train.tracking.tracker import Tracker, series


class WandB(Tracker):
    """Sends rows, pictures and alarms to Weights & Biases."""

    class Options(Section):
        project: str

        @model_validator(mode="after")
        def _installed(self) -> "WandB.Options":
            if importlib.util.find_spec("wandb") is None:
                raise ValueError("wandb is not installed; pip install dmdr-train[wandb], or leave it out")
            return self

    def __init__(self, folder: Path, recipe: Recipe, start: int, project: str):
        import wandb

        self.wandb: Any = wandb
        options = {"project": project, "dir": str(folder), "config": recipe.model_dump(mode="json")}
        try:
            self.run = wandb.init(**options)
        except wandb.Error:
            self.run = wandb.init(**options, mode="offline")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        self.run.log({series(step, name): self.wandb.Image(image, caption=name)}, step=step)

    def warn(self, step: int, text: str) -> None:
        self.run.alert(title="early warning", text=text)

    def close(self) -> None:
        self.run.finish()
