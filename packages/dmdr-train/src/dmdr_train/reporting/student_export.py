"""Export of the trained student as a folder that `dmdr-generate`, diffusers and PEFT open.

The LoRA of a text-to-image model is written as a LoRA, unless it builds on other weights than the model's; other
students are written as a whole network, with all LoRAs in it. If every step has a LoRA of its own, each has a
sub-folder. The folder also says how to sample the student, in dmdr.json and for diffusers in scheduler/, and has a
model card.
"""

import json
from pathlib import Path
from typing import Any

import torch
from dmdr_models.families.protocols import Family
from dmdr_models.folder.adapter_files import step_folder
from dmdr_models.folder.state_dicts import save_state_dict
from dmdr_models.networks.lora import LoRANetwork
from dmdr_models.networks.step_loras import StepLoRAs

from dmdr_train.base.atomic_files import write_folder
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.load import load_weights
from dmdr_train.checkpoint.manifest import STUDENT
from dmdr_train.evaluation.scores import Scores
from dmdr_train.recipe import schema
from dmdr_train.reporting.model_card import keeps_lora, model_card, sampling_settings
from dmdr_train.training.networks import load_family, make_generator, quantised_by


def export_student(
    folder: Path, settings: schema.Recipe, source: Path, scores: dict[str, Scores] | None = None
) -> None:
    """Write the averaged generator of the checkpoint `source`, how to sample it, and a model card.

    Args:
        scores: of the run's evaluation, for the model card.

    Raises:
        UserError: the checkpoint is of another model.
    """
    family, network = load_student(settings, source)
    sampling = sampling_settings(settings, family)

    def write(new: Path) -> None:
        if isinstance(network, StepLoRAs):
            for step, lora in enumerate(network.steps):
                family.students.save_lora(lora, new / step_folder(step))
        elif isinstance(network, LoRANetwork):
            family.students.save_lora(network, new)
        else:
            family.students.save(network, new)
        family.students.save_scheduler(new, sampling["shift"], stochastic=sampling["method"] == "sde")
        (new / "dmdr.json").write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(model_card(settings, family, folder, scores or {}), encoding="utf-8")

    write_folder(folder, write)


def check_original(settings: schema.Recipe) -> None:
    """Check that the family of a run has an original layout. No weights are read.

    Raises:
        UserError: it has none.
    """
    if not load_family(settings).students.has_original:
        raise UserError("--layout", f"the family {settings.model.family} has no original layout; use diffusers")


def export_state_dict(file: Path, settings: schema.Recipe, source: Path, original: bool = False) -> None:
    """Write the averaged generator of the checkpoint `source` as one file with its state dict; a LoRA is merged.

    Args:
        original: by the names of the model's authors, which other programs read, instead of diffusers' names.

    Raises:
        UserError: the checkpoint is of another model.
    """
    family, network = load_student(settings, source, whole=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    if original:
        family.students.save_original(network, file)
    else:
        save_state_dict(network, file)


def load_student(settings: schema.Recipe, source: Path, whole: bool = False) -> tuple[Family, Any]:
    """Load the averaged generator of a checkpoint, and its family.

    Args:
        whole: merge a LoRA. Otherwise the result is a LoRANetwork, or StepLoRAs, if `keeps_lora`.

    Raises:
        UserError: the checkpoint is of another model, or the LoRA would be merged into quantised weights, or
            there is one for each step.
    """
    family = load_family(settings)
    as_lora = keeps_lora(settings, family) and not whole
    if not as_lora and settings.lora_per_step:
        raise UserError(
            "--output", "the student has a LoRA for each step, and one network cannot hold them; give a folder"
        )
    if not as_lora and (method := quantised_by(family)) is not None:
        merging = f"{settings.model.path} has quantised weights ({method}), into which no LoRA is merged"
        raise UserError("--output", f"{merging}; give a folder for the LoRA alone")
    if not as_lora:
        family = load_family(settings, torch.float32)  # whatever the precision of the training was
    network: Any = make_generator(settings, family)
    load_weights("run", source / STUDENT, network)
    return family, network.merged() if isinstance(network, LoRANetwork) and not as_lora else network
