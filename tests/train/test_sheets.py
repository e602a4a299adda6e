"""Sheets of samples: their layout, captions, and how their pictures are read back."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dmdr_train.evaluation import caption_fonts
from dmdr_train.evaluation.caption_fonts import letters
from dmdr_train.evaluation.captioned_sheets import GAP, MARGIN, WIDEST, Layout, draw_sheet, wrapped
from dmdr_train.evaluation.sample_sheets import captions
from dmdr_train.run.milestones import Results
from dmdr_train.tracking.tracker import series
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image


def plain(colour: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.mark.parametrize(
    ("count", "size", "cell", "columns"),
    [
        (10, (32, 32), (128, 128), 10),  # enlarged four times
        (8, (1024, 1024), (225, 225), 8),  # as wide as there is space
        (2, (300, 200), (300, 200), 2),  # as it is
        (30, (832, 416), (118, 59), 15),  # in two blocks
        (19, (64, 64), (128, 128), 10),
    ],
)
def test_a_sheet_is_at_most_so_wide(count: int, size: tuple[int, int], cell: tuple[int, int], columns: int) -> None:
    layout = Layout(("a cat",) * count, size[1], size[0], ("teacher", "student"))
    assert (layout.cell, layout.columns) == (cell, columns)
    assert layout.size[0] == MARGIN + GAP + columns * (cell[0] + GAP) <= WIDEST


def test_rows_names_and_captions_are_where_they_belong() -> None:
    rows = {"teacher": [plain("red"), plain("lime")], "student": [plain("blue"), plain("black")]}
    sheet = draw_sheet(rows, ["a cat", "a very long caption that needs several lines to be read " * 3])
    layout = Layout(("a cat", "a very long caption that needs several lines to be read " * 3), 32, 32, tuple(rows))
    assert sheet.size == layout.size
    for row, (name, pictures) in enumerate(rows.items()):
        for column, picture in enumerate(pictures):
            x, y = layout.place(row, column)
            at = x + layout.cell[0] // 2, y + layout.cell[1] // 2
            assert sheet.getpixel(at) == picture.getpixel((0, 0)), name
    pixels = np.asarray(sheet.convert("L"))
    left, top = layout.place(2, 0)
    assert pixels[top : top + 20, left : left + 60].min() < 128  # a caption under the column
    assert pixels[top + 40 : top + 60, left : left + layout.cell[0]].min() == 255  # of one line
    assert pixels[top + 40 : top + 60, layout.place(2, 1)[0] :].min() < 128  # and one of four
    assert pixels[: layout.cell[1], :MARGIN].min() < 128  # the name of the row


def test_pictures_are_read_back_from_their_sheet() -> None:
    colours = ["red", "lime", "blue"]
    sheet = draw_sheet({"": [plain(colour) for colour in colours]}, colours)
    cells = Layout(tuple(colours), 32, 32).cells(sheet)
    assert [cell.getcolors() for cell in cells] == [[(128 * 128, plain(c).getpixel((0, 0)))] for c in colours]
    assert Layout((*colours, "a fourth"), 32, 32).cells(sheet) == []


def test_blocks_are_below_each_other() -> None:
    """Thirty columns do not fit beside each other; all of them are read back."""
    greys = [plain(f"#{i:02x}{i:02x}{i:02x}", (416, 416)) for i in range(30)]
    cells = Layout(("a",) * 30, 416, 416).cells(draw_sheet({"": greys}, ["a"] * 30))
    assert [cell.getpixel((5, 5)) for cell in cells] == [(i, i, i) for i in range(30)]


def test_long_captions_are_wrapped_and_cut() -> None:
    lines = wrapped("a small café in Lyon, " * 9, 100, 4)
    assert len(lines) == 4
    assert all(letters().getlength(line) <= 100 for line in lines)
    assert lines[-1].endswith("...")
    assert wrapped("a cat", 100, 4) == ["a cat"]
    assert wrapped("", 100, 4) == [""]
    broken = wrapped("x" * 40, 100, 40)
    assert len(broken) > 1
    assert "".join(broken) == "x" * 40


# -- letters that DejaVu Sans lacks


def font_of(letters: str, path: Path) -> Path:
    """Write a font in which each of the letters is a square of 0.8 em."""
    pen = TTGlyphPen(None)
    for move, at in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 800)), (pen.lineTo, (800, 800)), (pen.lineTo, (800, 0))):
        move(at)
    pen.closePath()
    square = pen.glyph()
    font = FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"uni{ord(letter):04X}" for letter in letters)]
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): f"uni{ord(letter):04X}" for letter in letters})
    font.setupGlyf({name: square if i else TTGlyphPen(None).glyph() for i, name in enumerate(names)})
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupPost()
    font.save(path)
    return path


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Path]]:
    """A machine with a Chinese font, a larger one, and a file that is no font."""
    made = {name: tmp_path / f"{name}.ttf" for name in ("broken", "chinese", "larger")}
    made["broken"].write_bytes(b"no font")
    font_of("狐狸", made["chinese"])
    font_of("狐狸雪a", made["larger"])
    monkeypatch.setattr(caption_fonts, "machines_fonts", lambda: list(made.values()))
    for function in (caption_fonts.best_font, caption_fonts.warn):
        function.cache_clear()
    yield made
    caption_fonts.best_font.cache_clear()


def test_a_caption_has_a_font_with_its_letters(fonts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    captions = ["a café, лиса", "狐狸", "雪 a\n狐", ""]
    fitting = caption_fonts.fitting(captions)
    assert [caption for caption, _ in fitting] == captions
    files = [Path(str(font.path)) for _, font in fitting]
    assert files == [caption_fonts.dejavu(), fonts["chinese"], fonts["larger"], caption_fonts.dejavu()]
    assert capsys.readouterr().err == ""
    layout = Layout(("狐狸" * 10,), 32, 32)
    top, left = layout.place(1, 0)[1], layout.place(1, 0)[0]
    pixels = np.asarray(draw_sheet({"": [plain("red")]}, layout.captions).convert("L"))
    assert [len(line) for line in layout.texts[0][0]] == [8, 8, 4]
    assert (pixels[top + 4 : top + 12, left + 2 : left + 100 : 14] < 64).all()  # the squares of the font, side by side
    assert layout.size[1] == len(pixels)


def test_letters_without_a_font_are_written_as_their_codes(
    fonts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    captions = ["a cat", "雪中的狐", "a \U0001fabf"]
    (cat, _), (fox, font), (goose, _) = caption_fonts.fitting(captions)
    assert (cat, fox, goose) == ("a cat", "2: 雪\\u4e2d\\u7684狐", "3: a \\U0001fabf")
    assert Path(str(font.path)) == fonts["larger"]  # it lacks the fewest
    said = capsys.readouterr().err
    assert said.startswith("warning: no font of this machine has all letters of the captions")
    assert said.count("\n") == 1
    assert "Noto Sans CJK" in said
    lines = wrapped("\\u4e2d" * 5, 100, 9)
    assert len(lines) > 1
    assert all(len(line) % 6 == 0 for line in lines), "a code is never broken"


def test_captions_are_prompts_or_classes() -> None:
    assert captions(["a cat", 207]) == ("a cat", "class 207")


def test_the_report_shows_the_sheets_that_fit(tmp_path: Any, make_recipe: Any) -> None:
    """Of the sheets in samples/, those of these prompts, under the names of teacher and stages."""
    settings = make_recipe(tracking__samples={"count": 2}, rollout__steps=2)
    (tmp_path / "samples").mkdir()
    for name, count in (("teacher-50", 2), ("teacher-2", 3), ("student-cold_start", 2), ("student-00000004", 2)):
        sheet = draw_sheet({"": [plain("red")] * count}, ["class 0", "class 1", "class 2"][:count])
        sheet.save(tmp_path / "samples" / f"{name}.png")
    family = SimpleNamespace(num_classes=2, size=(32, 32))
    results: Any = Results.__new__(Results)
    results.settings, results.folder = settings, tmp_path
    results.trainer = SimpleNamespace(family=family, guidance=None)
    assert {name: len(row) for name, row in results.rows().items()} == {
        "teacher\n50 steps": 2,
        "student\ncold start": 2,
    }


def test_pictures_of_one_kind_are_a_series() -> None:
    assert series(100, "student-00000100") == "samples/student"
    assert series(100, "teacher-50") == "samples/teacher-50"
