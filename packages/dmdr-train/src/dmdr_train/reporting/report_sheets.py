"""The pictures of the report: the sheets of samples of a run, scaled down and written into the page as data URIs."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

from dmdr_models.registry import find
from PIL import Image

from dmdr_train.data.prompt_files import evaluation_prompts
from dmdr_train.recipe.schema import Recipe

WIDEST = 1600
"""Pixels of the wider side of a sheet in the page."""
MOST_SHEETS = 24
"""Sheets of the student in the page, at most: the first, the last, and others between them at equal distances."""
MOST_BYTES = 8 * 2**20
"""Of the student's sheets as text in the page, at most, as long as more than two are left."""


@dataclass(frozen=True)
class Sheet:
    """A sheet of samples: its title, the step (for the teacher its number of steps), and the picture as a data URI."""

    title: str
    step: int
    data: str
    width: int
    height: int


def teacher_sheets(run: Path) -> list[Sheet]:
    """The sheets that the teacher drew, the one with the most steps first."""
    found = {int(path.stem.split("-")[1]): path for path in _sheets(run, r"teacher-\d+")}
    made = [(steps, path, f"teacher, {steps} step{'s' * (steps > 1)}") for steps, path in sorted(found.items())]
    return [sheet for steps, path, title in reversed(made) if (sheet := _sheet(path, title, steps))]


def student_sheets(run: Path, settings: Recipe, most: int = MOST_SHEETS) -> list[Sheet]:
    """The sheets of the student in the order of their steps; the sheet at the end of a stage names the stage.

    Args:
        most: the number of sheets, at least 2.
    """
    found = {int(path.stem.split("-")[1]): (path, "") for path in _sheets(run, r"student-\d+")}
    for stage, end in settings.stages.items():
        path = run / "samples" / f"student-{stage}.png"
        if path.is_file():
            found[end] = path, f", end of {stage.replace('_', ' ')}"
    chosen = sorted(found)
    if len(chosen) > most:
        chosen = [chosen[round(i * (len(chosen) - 1) / (most - 1))] for i in range(most)]
    made = ((step, *found[step]) for step in chosen)
    sheets = [sheet for step, path, stage in made if (sheet := _sheet(path, f"student at step {step:,}{stage}", step))]
    return fitting(sheets)


def fitting(sheets: list[Sheet], most: int = MOST_BYTES) -> list[Sheet]:
    """Leave out every second sheet, but never the first or the last, until all together have at most `most` bytes."""
    while len(sheets) > 2 and sum(len(sheet.data) for sheet in sheets) > most:
        sheets = [*sheets[:-1:2], sheets[-1]]
    return sheets


def sheet_prompts(settings: Recipe) -> list[str]:
    """The prompts of the columns; empty for a model of class labels."""
    samples = settings.tracking.samples
    try:
        texts = find(settings.model.family).takes == "texts"
    except ValueError:  # the family's package is not installed here
        texts = samples.prompts is not None
    return list(samples.prompts or evaluation_prompts())[: samples.count] if texts else []


def _sheets(run: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(run.glob("samples/*.png")) if re.fullmatch(pattern, path.stem)]


def _sheet(path: Path, title: str, step: int) -> Sheet | None:
    """Read a sheet; None if it cannot be read, such as a file that a power failure damaged."""
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    picture.thumbnail((WIDEST, 2 * WIDEST))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=82)
    data = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return Sheet(title, step, data, picture.width, picture.height)
