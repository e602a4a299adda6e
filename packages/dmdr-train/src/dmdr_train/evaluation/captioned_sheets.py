"""Sheets of pictures: a row per network with its name on the left, and under each column the prompt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image, ImageDraw, ImageFont

from dmdr_train.evaluation.caption_fonts import CODE, SIZE, fitting, letters

WIDEST = 2000
"""Pixels, at most, of a sheet."""
MARGIN = 160
"""Pixels for the names of the rows."""
CELL = (96, 144)
"""The width of a column, at least, and the width up to which small pictures are enlarged, in pixels."""
GAP, LINES, PITCH = 4, 4, SIZE + 4
"""Pixels between pictures; lines of a caption, at most; and pixels from one of its lines to the next."""


@dataclass(frozen=True)
class Layout:
    """Where the pictures of a sheet are. Columns that do not fit beside each other go into blocks below each other.

    Args:
        captions: one for each column.
        height, width: of a picture in pixels.
        rows: the names of the rows; names that are all empty leave no margin.
    """

    captions: tuple[str, ...]
    height: int
    width: int
    rows: tuple[str, ...] = ("",)

    @cached_property
    def columns(self) -> int:
        """Columns of a block; all blocks have equally many, except perhaps the last."""
        most = (WIDEST - MARGIN - GAP) // (CELL[0] + GAP)
        blocks = -(-len(self.captions) // most)
        return -(-len(self.captions) // blocks)

    @cached_property
    def cell(self) -> tuple[int, int]:
        """Width and height of a picture on the sheet: whole multiples of small ones, large ones scaled down."""
        most = (WIDEST - MARGIN - GAP) // self.columns - GAP
        times = min(CELL[1], most) // self.width
        width = self.width * times if times else min(self.width, most)
        return width, max(1, round(self.height * width / self.width))

    @cached_property
    def texts(self) -> list[tuple[list[str], ImageFont.FreeTypeFont]]:
        """The lines of each caption, and their font."""
        width = self.cell[0] - 2 * GAP
        return [(wrapped(caption, width, LINES, font), font) for caption, font in fitting(self.captions)]

    @property
    def block_height(self) -> int:
        """Pixels from the top of a block to the top of the next."""
        lines = max(len(text) for text, _ in self.texts)
        return len(self.rows) * (self.cell[1] + GAP) + lines * PITCH + 4 * GAP

    @property
    def margin(self) -> int:
        return MARGIN if any(self.rows) else 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        blocks = -(-len(self.captions) // self.columns)
        return self.margin + GAP + self.columns * (self.cell[0] + GAP), GAP + blocks * self.block_height

    def place(self, row: int, column: int) -> tuple[int, int]:
        """The left upper corner of a picture; of a row after the last one, that of the caption."""
        block, across = divmod(column, self.columns)
        left = self.margin + GAP + across * (self.cell[0] + GAP)
        return left, GAP + block * self.block_height + row * (self.cell[1] + GAP)

    def cells(self, sheet: Image.Image) -> list[Image.Image]:
        """The pictures of the first row of a sheet; none if the sheet has another layout."""
        if sheet.size != self.size:
            return []
        places = [self.place(0, column) for column in range(len(self.captions))]
        return [sheet.crop((x, y, x + self.cell[0], y + self.cell[1])) for x, y in places]


def draw_sheet(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Draw a sheet of pictures.

    Args:
        rows: pictures of one size by the names of the rows; at least one row, with as many pictures as captions.
    """
    first = next(iter(rows.values()))[0]
    layout = Layout(tuple(captions), first.height, first.width, tuple(rows))
    sheet = Image.new("RGB", layout.size, "white")
    canvas, font = ImageDraw.Draw(sheet), letters()
    for i, (name, pictures) in enumerate(rows.items()):
        for column, picture in enumerate(pictures):
            how = Image.Resampling.LANCZOS if layout.cell[0] < picture.width else Image.Resampling.NEAREST
            sheet.paste(picture.convert("RGB").resize(layout.cell, how), layout.place(i, column))
            if column % layout.columns == 0:
                title = "\n".join(line for part in name.split("\n") for line in wrapped(part, MARGIN - 3 * GAP, LINES))
                at = (2 * GAP, layout.place(i, column)[1] + layout.cell[1] // 2)
                canvas.multiline_text(at, title, fill="black", font=font, anchor="lm")
    for column, (lines, font) in enumerate(layout.texts):
        left, top = layout.place(len(rows), column)
        for i, line in enumerate(lines):
            canvas.text((left, top + SIZE + i * PITCH), line, fill="black", font=font, anchor="ls")  # at its base line
    return sheet


def wrapped(text: str, width: int, most: int, font: ImageFont.FreeTypeFont | None = None) -> list[str]:
    """The text in lines that are at most `width` pixels wide; after `most` lines it ends with three dots.

    A word that is wider than a line is broken.
    """
    font = font or letters()
    lines = [""]
    for word in text.split():
        for i, part in enumerate(parts(word, width, font)):
            together = f"{lines[-1]} {part}" if lines[-1] and not i else part
            if (lines[-1] and i) or font.getlength(together) > width:
                lines.append(part)
            else:
                lines[-1] = together
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last.rstrip()}..."]


def parts(word: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """A word in parts that are at most `width` pixels wide, each of at least one letter, or one letter's code."""
    found = [""]
    for letter in re.findall(CODE + r"|.", word, re.DOTALL):
        if found[-1] and font.getlength(found[-1] + letter) > width:
            found.append("")
        found[-1] += letter
    return found
