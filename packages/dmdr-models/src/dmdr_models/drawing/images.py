"""Pictures as files: a grid of several, written as a PNG."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dmdr_models.base.atomic_files import write_whole


def grid(images: Tensor, columns: int, padding: int = 2, scale: int = 1) -> Image.Image:
    """Lay pictures out row by row on white; the last row may have empty places.

    Args:
        images: `[B, 3, H, W]` in [0, 1], any floating-point dtype, any device.
        columns: pictures in a row.
        padding: white pixels between pictures and around them all.
        scale: each picture's pixel becomes a square of `scale` pixels.

    Raises:
        ValueError: another shape, a value outside [0, 1] or NaN, or a number that is too small.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}: give [B, 3, H, W] with at least one picture")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images lie in [{low:g}, {high:g}]: give values in [0, 1]")
    if columns < 1 or padding < 0 or scale < 1:
        raise ValueError(f"columns {columns}, padding {padding}, scale {scale}: give at least 1, 0 and 1")
    bytes_ = (images.detach().float() * 255).round().to(device="cpu", dtype=torch.uint8)
    bytes_ = bytes_.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    rows = -(-len(bytes_) // columns)
    height, width = bytes_.shape[2] + padding, bytes_.shape[3] + padding
    sheet = torch.full((3, rows * height + padding, columns * width + padding), 255, dtype=torch.uint8)
    for index, picture in enumerate(bytes_):
        top, left = index // columns * height + padding, index % columns * width + padding
        sheet[:, top : top + picture.shape[1], left : left + picture.shape[2]] = picture
    return Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())


def save_png(image: Image.Image, path: str | Path) -> None:
    """Write a PNG, which is either complete or not there.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    write_whole(Path(path), lambda partial: image.save(partial, format="PNG"))
