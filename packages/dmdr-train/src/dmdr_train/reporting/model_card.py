"""The README.md and the dmdr.json of an exported student: what it is, how to sample it, and how good it is."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmdr_models.base.picture_size import size_text
from dmdr_models.families.protocols import Family

from dmdr_train.distributed.device import DTYPES, kind_of_device
from dmdr_train.evaluation.scores import Scores
from dmdr_train.evaluation.seeded_sampling import student_plan
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.tables import markdown_table


def sampling_settings(settings: Recipe, family: Family) -> dict[str, Any]:
    """The contents of dmdr.json: how the student is to be sampled."""
    plan = {"family": settings.model.family, **asdict(student_plan(settings)), **family.students.sampling}
    return plan | ({"lora_per_step": True} if settings.lora_per_step else {})


def usage(settings: Recipe, family: Family, folder: Path) -> str:
    """How to draw from the student in `folder`, on the run's device and in its precision, as Markdown."""
    lora = keeps_lora(settings, family)
    dtype = str(DTYPES[settings.optim.precision]).removeprefix("torch.")
    device = kind_of_device(settings.run)
    return family.students.usage(folder, sampling_settings(settings, family), lora, device, dtype)


def keeps_lora(settings: Recipe, family: Family) -> bool:
    """Whether the student is written as a LoRA, which fits the weights at `model.path`; otherwise it is merged.

    A LoRA that was trained on the weights of `model.generator`, or on a teacher with LoRAs of its own, would be put on
    other weights by everyone who has only the model.
    """
    return settings.lora_stands_alone and family.students.keeps_lora


def model_card(settings: Recipe, family: Family, folder: Path, scores: dict[str, Scores]) -> str:
    """The README.md of an exported student: how to sample it, its scores, and its recipe."""
    steps, base = settings.rollout.steps, settings.model.path
    start = settings.model.generator
    began = "" if start is None else f" It began with the weights `{Path(start).name}`, which it contains."
    began += trained_sizes(settings) + quantised_base(settings)
    loras = "".join(
        f", and from its LoRA `{Path(x.path).name}` at {x.strength:g}" for x in settings.model.teacher_loras
    )
    text = f"""# Student ({settings.model.family}, {steps} step{"s" if steps > 1 else ""})

Distilled with dmdr from `{Path(base).name}`, whose licence applies{licence(Path(base))}{loras}.{began}

{usage(settings, family, folder)}
"""
    if scores:
        text += f"\n## Evaluation\n\n{markdown_table(scores)}\n"
    return f"{text}\n## Recipe\n\n```yaml\n{dump_recipe(settings)}```\n"


def trained_sizes(settings: Recipe) -> str:
    """The sizes that the student was trained at, where there are several."""
    sizes = settings.model.sizes
    if len(sizes) < 2:
        return ""
    shares = ", ".join(f"{size_text(size.shape)} ({size.share:.0%})" for size in sizes)
    return (
        f" It was trained at {len(sizes)} sizes, height x width in pixels: {shares}; the commands below draw the first."
    )


def quantised_base(settings: Recipe) -> str:
    """That the student was trained on quantised weights, where it was."""
    kind = settings.memory.quantize
    if kind is None:
        return ""
    return (
        f" It was trained on a frozen network whose linear layers were quantised ({kind}), and is for the weights "
        f"before quantisation."
    )


def licence(base: Path) -> str:
    """The licence that the model card of the teacher names; empty if there is no card."""
    card = base / "README.md"
    if not card.is_file():
        return ""
    found = dict(re.findall(r"^(license|license_name|license_link): *(.+)$", card.read_text(encoding="utf-8"), re.M))
    return f": {', '.join(found.values())}" if found else ""
