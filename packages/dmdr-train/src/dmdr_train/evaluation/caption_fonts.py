"""The fonts of captions: DejaVu Sans, or another font of the machine for letters that it lacks, as in Chinese."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import ImageFont

SIZE = 14
"""Of the letters, in pixels."""
CODE = r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}"
"""What stands in the place of a letter that no font has."""


def fitting(captions: Sequence[str]) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    r"""What can be drawn of each caption, and with which font.

    Where no font has all letters of a caption, the letters without a font are written as `\u72d0`, and the caption
    begins with its number, counted from 1, so that it can be looked up. A warning then says how to mend it.
    """
    found = []
    for number, caption in enumerate(captions, 1):
        path = best_font(frozenset(caption))
        missing = lacking(path, frozenset(caption))
        if missing:
            warn()
            escaped = "".join(_escaped(letter) if letter in missing else letter for letter in caption)
            caption = f"{number}: {escaped}"
        found.append((caption, opened(path)))
    return found


@cache
def best_font(wanted: frozenset[str]) -> Path:
    """DejaVu Sans if it has all these letters; otherwise the first of the machine's fonts that lacks the fewest."""
    if not lacking(dejavu(), wanted):
        return dejavu()
    return min([dejavu(), *machines_fonts()], key=lambda path: len(lacking(path, wanted)))


def lacking(path: Path, wanted: frozenset[str]) -> frozenset[str]:
    """The letters that a font does not have; white space needs none."""
    return frozenset(letter for letter in wanted if not letter.isspace() and ord(letter) not in coverage(path))


@cache
def coverage(path: Path) -> frozenset[int]:
    """The code points of a font; none if it cannot be drawn at our size, as a font of coloured pictures cannot."""
    from matplotlib.ft2font import FT2Font

    try:
        opened(path)
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def machines_fonts() -> list[Path]:
    """The fonts that are installed on the machine, regular ones first."""
    from matplotlib.font_manager import findSystemFonts

    return sorted(map(Path, findSystemFonts()), key=lambda path: ("regular" not in path.name.lower(), path))


@cache
def dejavu() -> Path:
    """The file of DejaVu Sans, which matplotlib brings along; Pillow's own font has only the letters of English."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


@cache
def opened(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, SIZE)


def letters() -> ImageFont.FreeTypeFont:
    """The font of captions that it has all letters of, and of the names of rows."""
    return opened(dejavu())


@cache
def warn() -> None:
    """Say once what to install."""
    print(
        "warning: no font of this machine has all letters of the captions, and sample sheets show codes such as "
        "\\u72d0 in their place; install a font that has them, such as Noto Sans CJK (on Debian: fonts-noto-cjk)",
        file=sys.stderr,
        flush=True,
    )


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) <= 0xFFFF else f"\\U{ord(letter):08x}"
