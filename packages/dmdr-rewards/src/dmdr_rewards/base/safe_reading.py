"""Safe reading of files from others: pictures in known formats, JSON, and names that stay inside a folder.

Imports no torch.
"""

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""The formats that Pillow may decode, whatever a file is called. Other formats run further programs (EPS), or have
decoders that are rarely used and little tested."""


def open_rgb(file: Any) -> Image.Image:
    """Decode the picture in a path or an open file to RGB. Errors of the decoders are passed on, of any type."""
    Image.init()
    with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
        return opened.convert("RGB")


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for text that is not JSON or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, for a name from a file of others. Symbolic links are followed: the user put them there.

    Raises ValueError for a name that leads out of the folder.
    """
    path = folder / name
    if "\0" in name or not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"{name!r} leads out of {folder}: names must stay in that folder")
    return path
