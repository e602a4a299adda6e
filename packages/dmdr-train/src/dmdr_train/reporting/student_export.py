"""The trained student as a folder of its own, which `dmdr-generate`, diffusers and PEFT open.

A LoRA on a text-to-image model stays one; other students are written as a whole network. Beside it stand how to sample
it (dmdr.json, and scheduler/ for diffusers) and a model card.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from dmdr_models.families.protocols import Family
from dmdr_models.folder.state_dicts import save_state_dict
from dmdr_models.networks.lora import LoRANetwork

from dmdr_train.checkpoint.load import load_weights
from dmdr_train.checkpoint.manifest import STUDENT
from dmdr_train.distributed.device import DTYPES, device_name
from dmdr_train.evaluation.scores import Scores
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.reporting.tables import markdown_table
from dmdr_train.training.networks import load_family, make_generator


def export_student(
    folder: Path, settings: schema.Recipe, source: Path, scores: dict[str, Scores] | None = None
) -> None:
    """Write the averaged generator of the checkpoint `source`, and how to sample it.

    The folder is written beside its place and renamed into it.

    Args:
        scores: of the run's evaluation, for the model card.

    Raises:
        UserError: the checkpoint is of another model.
    """
    family, network = load_student(settings, source)
    sampling = sampling_settings(settings, family)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if isinstance(network, LoRANetwork):
        family.students.save_lora(network, partial)
    else:
        family.students.save(network, partial)
    family.students.save_scheduler(partial, sampling["shift"], stochastic=sampling["method"] == "sde")
    (partial / "dmdr.json").write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
    (partial / "README.md").write_text(model_card(settings, family, folder, scores or {}), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def export_state_dict(file: Path, settings: schema.Recipe, source: Path) -> None:
    """Write the averaged generator of the checkpoint `source` as one file with its state dict, a LoRA merged into it.

    Raises:
        UserError: the checkpoint is of another model.
    """
    _, network = load_student(settings, source, whole=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_state_dict(network, file)


def load_student(settings: schema.Recipe, source: Path, whole: bool = False) -> tuple[Family, Any]:
    """The averaged generator of a checkpoint, and its family: a LoRANetwork if that is how it is handed out.

    Args:
        whole: merge a LoRA in any case.
    """
    family = load_family(settings)
    keeps_lora = settings.model.generator_lora is not None and family.students.keeps_lora and not whole
    if not keeps_lora:
        family = load_family(settings, torch.float32)  # whatever it trained in: the weights are what is handed out
    network: Any = make_generator(settings, family)
    load_weights("run", source / STUDENT, network)
    return family, network.merged() if isinstance(network, LoRANetwork) and not keeps_lora else network


def sampling_settings(settings: schema.Recipe, family: Family) -> dict[str, Any]:
    """How the student is to be sampled: as it was trained."""
    method = {"sde": "sde", "ode": "euler"}[settings.rollout.mode]
    return {
        "family": settings.model.family,
        "steps": settings.rollout.steps,
        "method": method,
        "guidance": 1.0,
        "shift": settings.rollout.shift,
        **family.students.sampling,
    }


def usage(settings: schema.Recipe, family: Family, folder: Path) -> str:
    """How to draw from the student in `folder`, on the run's device and in its precision, as Markdown."""
    lora = settings.model.generator_lora is not None and family.students.keeps_lora
    dtype = str(DTYPES[settings.optim.precision]).removeprefix("torch.")
    return family.students.usage(folder, sampling_settings(settings, family), lora, device_name(settings.run), dtype)


def model_card(settings: schema.Recipe, family: Family, folder: Path, scores: dict[str, Scores]) -> str:
    """README.md of an exported student: what it is, how to draw from it, how good it is, and its recipe."""
    steps, base = settings.rollout.steps, settings.model.path
    text = f"""# Student ({settings.model.family}, {steps} step{"s" if steps > 1 else ""})

Distilled with dmdr from `{Path(base).name}`, whose licence applies{licence(Path(base))}.

{usage(settings, family, folder)}
"""
    if scores:
        text += f"\n## Evaluation\n\n{markdown_table(scores)}\n"
    return f"{text}\n## Recipe\n\n```yaml\n{dump_recipe(settings)}```\n"


def licence(base: Path) -> str:
    """What the card of the base model calls its licence; nothing where it has none here."""
    card = base / "README.md"
    if not card.is_file():
        return ""
    found = dict(re.findall(r"^(license|license_name|license_link): *(.+)$", card.read_text(encoding="utf-8"), re.M))
    return f": {', '.join(found.values())}" if found else ""
