"""Files and names that come from others: pictures of known formats, JSON, and names that stay in their folder.

Imports no torch.
"""

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
"""What Pillow may take a picture for, whatever its name ends in. Others hand it to further programs (EPS), or are rare
enough for their decoders to be little tried."""


def open_rgb(file: Any) -> Image.Image:
    """The picture in a path or an open file, decoded, in RGB. Raises whatever the decoders raise."""
    Image.init()
    with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
        return opened.convert("RGB")


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, also for brackets nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, for a name that a file of others gives. Links on the way are the user's own and are followed.

    Raises ValueError for a name that leads out of the folder.
    """
    path = folder / name
    if "\0" in name or not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder)):
        raise ValueError(f"{name!r} leads out of {folder}: names must stay in that folder")
    return path
