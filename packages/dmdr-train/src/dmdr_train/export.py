"""The trained student as a folder of its own, which `dmdr-generate` and `dmdr_models.load` open."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dmdr_models.family import Family
from dmdr_models.lora import LoRANetwork

from dmdr_train import recipe
from dmdr_train.checkpoint import STUDENT, load_weights
from dmdr_train.recipe_file import dump_recipe
from dmdr_train.session import make_generator


def export_student(folder: Path, settings: recipe.Recipe, family: Family, source: Path) -> None:
    """Write the averaged generator of the checkpoint `source`, the VAE, and how to sample them.

    The folder is written beside its place and renamed into it.

    Raises:
        UserError: the checkpoint is of another model.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network: Any = make_generator(settings, family)
    load_weights("checkpoint", source / STUDENT, network)
    if isinstance(network, LoRANetwork):
        network = network.merged()
    family.save(network, partial)
    (partial / "dmdr.json").write_text(json.dumps(sampling_settings(settings), indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(model_card(settings, folder), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def sampling_settings(settings: recipe.Recipe) -> dict[str, Any]:
    """How the student is to be sampled: as it was trained."""
    method = {"sde": "sde", "ode": "euler"}[settings.rollout.mode]
    return {
        "family": settings.model.family,
        "steps": settings.rollout.steps,
        "method": method,
        "guidance": 1.0,
        "shift": settings.rollout.shift,
    }


def model_card(settings: recipe.Recipe, folder: Path) -> str:
    """README.md of an exported student: what it is, how to draw from it, and its recipe."""
    steps = settings.rollout.steps
    return f"""# A {settings.model.family} student for {steps} step{"s" if steps > 1 else ""}

Distilled with dmdr from `{Path(settings.model.path).name}`, whose licence applies.

    dmdr-generate --family {settings.model.family} --model {folder} --classes 0,1 -o pictures.png

## Recipe

```yaml
{dump_recipe(settings)}```
"""
