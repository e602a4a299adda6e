"""Safe reading of files from others: pictures in known formats, JSON, and names that stay inside a folder.

Imports no torch.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF")
"""The formats that Pillow may decode, whatever a file is called. Other formats run further programs (EPS), or have
decoders that are rarely used and little tested."""


def open_rgb(file: Any) -> Image.Image:
    """Decode the picture in a path or an open file, as `as_rgb` does.

    Errors of the decoders are passed on, of any type. Raises ValueError for pixels without a known range.
    """
    Image.init()
    with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as opened:
        return as_rgb(opened)


def as_rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB with 8 bits per channel, upright.

    An alpha channel is dropped, 16 bits of grey are rounded to 8, and the EXIF orientation is applied, as every viewer
    does. A TIFF says whether its greys have 12 or 16 bits, and whether 0 is white. Raises ValueError for a picture of
    32-bit integers or floats: nothing says which value is white.
    """
    picture.load()
    tags = getattr(picture, "tag_v2", {})
    if picture.mode in ("I", "F"):
        kind = "32-bit integers" if picture.mode == "I" else "floats"
        raise ValueError(f"its pixels are {kind}, whose white is unknown: save it with 8 or 16 bits per channel")
    with suppress(Exception):  # damaged EXIF data raises any exception, and says nothing about the pixels
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        import numpy as np  # slow, and the command line does without it until there is something to score

        # Pillow's own conversion clips at 255, which makes almost every such picture white.
        white = (1 << tags.get(BITSPERSAMPLE, (16,))[0]) - 1
        grey = (np.asarray(picture).astype(np.uint32) * 255 + white // 2) // white
        grey = 255 - grey if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else grey
        picture = Image.fromarray(grey.astype(np.uint8))
    return picture.convert("RGB")


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
