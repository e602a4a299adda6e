"""Pictures by the files that `dmdr-generate` writes them to."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

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
            files[args.separate / f"{index:05d}-{label}.png"] = grid(picture[None], columns=1, padding=0)
    return files


def by_text(args: argparse.Namespace, pictures: Tensor) -> dict[Path, Image]:
    """One file per picture, with its number if there are several; or with `--grid` one contact sheet."""
    if args.grid:
        return {args.output: grid(pictures, columns=math.ceil(math.sqrt(len(pictures))))}
    names = [args.output]
    if len(pictures) > 1:
        names = [args.output.with_stem(f"{args.output.stem}-{index:05d}") for index in range(len(pictures))]
    return {path: grid(picture[None], columns=1, padding=0) for path, picture in zip(names, pictures, strict=True)}
