"""Pictures by the files that `dmdr-generate` writes them to.

The `info` of a file with one picture holds its `prompt` or `label`, for the list beside the pictures.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from dmdr_models.drawing.images import grid


def by_label(args: argparse.Namespace, labels: Sequence[int], columns: int, pictures: Tensor) -> dict[Path, Image]:
    """One grid with a row per class, and each picture as a file of its own if `--separate` names a folder.

    Args:
        labels: of the pictures, one each.
        columns: pictures in a row.
        pictures: `[B, 3, H, W]` in [0, 1].
    """
    files = {args.output: grid(pictures, columns)}
    if args.separate:
        for index, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
            files[args.separate / f"{index:05d}-{label}.png"] = _single(picture, label=label)
    return files


def by_text(args: argparse.Namespace, texts: Sequence[str], pictures: Tensor) -> dict[Path, Image]:
    """One file per picture, with its number if there are several; or with `--grid` one contact sheet."""
    if args.grid:
        return {args.output: grid(pictures, columns=math.ceil(math.sqrt(len(pictures))))}
    names = [args.output]
    if len(pictures) > 1:
        names = [args.output.with_stem(f"{args.output.stem}-{index:05d}") for index in range(len(pictures))]
    return {path: _single(picture, prompt=text) for path, text, picture in zip(names, texts, pictures, strict=True)}


def _single(picture: Tensor, **info: Any) -> Image:
    image = grid(picture[None], columns=1, padding=0)
    image.info.update(info)
    return image
