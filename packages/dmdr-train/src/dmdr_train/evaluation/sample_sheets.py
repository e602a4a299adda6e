"""Sheets of samples: the pictures in a column start from the same noise, whichever network draws them."""

from pathlib import Path
from typing import Any

import torch
from dmdr_models.drawing.images import grid, save_png
from dmdr_models.families.protocols import Family
from PIL import Image, ImageDraw, ImageFont
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


def labelled_rows(rows: dict[str, Image.Image]) -> Image.Image:
    """One picture of all rows below each other, with their names on the left."""
    font = ImageFont.load_default(size=16)
    margin = 12 + max(int(font.getlength(line)) for name in rows for line in name.split("\n"))
    width = margin + max(row.width for row in rows.values())
    page = Image.new("RGB", (width, sum(row.height for row in rows.values())), "white")
    canvas = ImageDraw.Draw(page)
    top = 0
    for name, row in rows.items():
        page.paste(row, (margin, top))
        canvas.multiline_text((6, top + row.height // 2), name, fill="black", font=font, anchor="lm")
        top += row.height
    return page


def sample_row(images: Tensor) -> Image.Image:
    """One picture of all `images`, `[N, 3, H, W]` in [0, 1], side by side. Small images are enlarged; NaN is black."""
    return grid(images.nan_to_num(0.0), columns=len(images), scale=max(1, 96 // images.shape[-1]))


def save_row(row: Image.Image, folder: Path, name: str) -> None:
    """Save a row of samples as folder/name.png."""
    folder.mkdir(parents=True, exist_ok=True)
    save_png(row, folder / f"{name}.png")
