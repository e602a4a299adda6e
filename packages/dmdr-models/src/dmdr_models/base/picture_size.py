"""The size of a picture in pixels: its side if it is square, else its height and width. Imports no torch."""

import re
from argparse import ArgumentTypeError
from collections.abc import Sequence

Resolution = int | Sequence[int]
"""The side of a square picture, or (height, width)."""


def as_size(resolution: Resolution) -> tuple[int, int]:
    """(height, width) of a side, or of a height and a width."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return height, width


def as_setting(size: tuple[int, int]) -> int | list[int]:
    """A size as files keep it: the side of a square picture, else [height, width]."""
    return size[0] if size[0] == size[1] else list(size)


def size_text(resolution: Resolution) -> str:
    """A size as messages and `dmdr-generate --size` write it: 1024, or 832x1216 for height and width."""
    height, width = as_size(resolution)
    return f"{height}" if height == width else f"{height}x{width}"


def read_size(text: str) -> int | tuple[int, int]:
    """Read what `size_text` writes.

    Raises:
        ArgumentTypeError: for any other text.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text, re.ASCII)
    if match is None:
        raise ArgumentTypeError(f"{text!r} is no size: give a side such as 1024, or HEIGHTxWIDTH such as 832x1216")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))
