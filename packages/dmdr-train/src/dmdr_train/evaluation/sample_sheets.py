"""Samples: the pictures in a column of a sheet start from the same noise, whichever network draws them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dmdr_models.drawing.images import grid, save_png
from dmdr_models.families.protocols import Family
from PIL import Image
from torch import Tensor

from dmdr_train.data.prompt_files import evaluation_prompts
from dmdr_train.evaluation.seeded_sampling import SamplingPlan, draw_latents
from dmdr_train.recipe import schema


@torch.no_grad()
def draw_samples(
    family: Family,
    settings: schema.Samples,
    device: torch.device,
    batch: int,
    network: Any,
    plan: SamplingPlan,
) -> Tensor:
    """Draw `settings.count` pictures, `[N, 3, H, W]` in [0, 1]; noise and prompts are the same at every call.

    Args:
        batch: pictures that are drawn at once, as many as fit into memory.
    """
    prompts = sample_prompts(family.num_classes, settings)
    pictures = []
    for index in (range(i, min(i + batch, len(prompts))) for i in range(0, len(prompts), batch)):
        chosen = [prompts[i] for i in index]
        latents = draw_latents(family, network, plan, chosen, settings.seed, index, device, noise="samples")
        pictures.append(family.decode(latents))
    return torch.cat(pictures)


def sample_prompts(num_classes: int | None, settings: schema.Samples) -> list[Any]:
    """The prompts of the samples: classes in turn, or the first prompts of the recipe, or of the built-in list."""
    if num_classes is None:
        return (settings.prompts or evaluation_prompts())[: settings.count]
    stride = max(1, num_classes // settings.count)
    return [i * stride % num_classes for i in range(settings.count)]


def captions(prompts: Sequence[Any]) -> tuple[str, ...]:
    """What stands under the pictures: the prompts, or their classes."""
    return tuple(prompt if isinstance(prompt, str) else f"class {prompt}" for prompt in prompts)


def pictures(images: Tensor) -> list[Image.Image]:
    """`[N, 3, H, W]` in [0, 1] as pictures; NaN is black."""
    return [grid(image[None], columns=1, padding=0) for image in images.nan_to_num(0.0)]


def save_sheet(sheet: Image.Image, folder: Path, name: str) -> None:
    """Save a sheet of samples as folder/name.png."""
    folder.mkdir(parents=True, exist_ok=True)
    save_png(sheet, folder / f"{name}.png")
