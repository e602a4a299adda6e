"""Pictures to files: a grid of them, and a PNG that is either complete or not there."""

import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def grid(images: Tensor, columns: int, padding: int = 2, scale: int = 1) -> Image.Image:
    """Lay pictures out row by row on white; places left over in the last row stay white.

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
    """Write a PNG beside `path` first and move it there when it is complete.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(partial, format="PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
