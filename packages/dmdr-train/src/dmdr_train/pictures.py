"""Pictures of a run: the same noise down each column, whatever drew it."""

from pathlib import Path
from typing import Any

import torch
from dmdr_core import randn
from dmdr_models.family import Family
from dmdr_models.sampling import sample
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dmdr_train import recipe
from dmdr_train.draws import named_generator


@torch.no_grad()
def draw_samples(
    family: Family,
    network: Any,
    settings: recipe.Samples,
    device: torch.device,
    steps: int,
    method: str,
    guidance: float = 1.0,
    shift: float = 1.0,
) -> Tensor:
    """A row of `settings.count` pictures, classes in turn; noise and classes are the same at every call."""
    assert family.num_classes is not None
    stride = max(1, family.num_classes // settings.count)
    labels = [i * stride % family.num_classes for i in range(settings.count)]
    noise = randn(
        (settings.count, *family.latent_shape),
        [named_generator(settings.seed, "samples", i) for i in range(settings.count)],
        device=device,
    )
    fresh = [named_generator(settings.seed, "rollout", i) for i in range(settings.count)]
    latents = sample(family, network, family.condition(labels), noise, steps, method, guidance, shift, fresh)
    return family.decode(latents)


def labelled_rows(rows: dict[str, Image.Image]) -> Image.Image:
    """Rows of pictures below each other, each with its name on the left."""
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


def save_row(family: Family, images: Tensor, folder: Path, name: str) -> Image.Image:
    """Save a row of samples as folder/name.png, small pictures enlarged."""
    from dmdr_models.images import grid, save_png

    image = grid(images, columns=len(images), scale=max(1, 96 // images.shape[-1]))
    folder.mkdir(parents=True, exist_ok=True)
    save_png(image, folder / f"{name}.png")
    return image
