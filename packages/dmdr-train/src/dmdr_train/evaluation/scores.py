"""The scores of a set of pictures, and evaluation.json with the scores of a run."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.base.errors import UserError

FOLDER = "evaluation"
"""In a run's folder: what `dmdr-train evaluate` writes."""
OWN, LATER = "Evaluation", "Evaluation by dmdr-train evaluate"
"""Titles of a run's evaluations."""


@dataclass(frozen=True)
class Scores:
    """Scores of one set of pictures; None is for what was not measured.

    Attributes:
        more: further means, by the reference and by rewards; `NAME, SET` is the mean over one set of prompts.
        intervals: 95% bootstrap confidence intervals of means, under the names of the scores.
        seconds: per picture, on one process.
        broken: the numbers of the pictures that were not finite; no score counts them.
    """

    name: str
    frechet: float | None = None
    precision: float | None = None
    recall: float | None = None
    accuracy: float | None = None
    frechet_pixels: float | None = None
    inception: float | None = None
    more: dict[str, float] = field(default_factory=dict)
    kernel: float | None = None
    density: float | None = None
    coverage: float | None = None
    diversity: float | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float | None = None
    broken: list[int] = field(default_factory=list)


def save_scores(folder: Path, scores: dict[str, Scores]) -> None:
    """Write scores to evaluation.json, so that a resumed run need not measure them again."""
    text = json.dumps({key: asdict(value) for key, value in scores.items()}, indent=2)
    write_whole(folder / "evaluation.json", lambda path: path.write_text(text, encoding="utf-8"))


def all_scores(run: Path) -> dict[str, dict[str, Scores]]:
    """Read the evaluations of a run by their titles: its own, and that of `dmdr-train evaluate`; those that there are.

    They may have other prompts and pictures, so their rows do not stand in one table. In each, rows of real pictures
    and of the teacher come first.

    Raises:
        UserError: a file is damaged.
    """
    found = {OWN: read_scores(run), LATER: read_scores(run / FOLDER)}
    return {
        title: {key: scores[key] for key in sorted(scores, key=_references_first)}
        for title, scores in found.items()
        if scores
    }


def _references_first(key: str) -> int:
    return 0 if key == "real" else 1 if key.startswith("teacher") else 2


def read_scores(folder: Path) -> dict[str, Scores]:
    """Read the scores of a run; empty if it has no evaluation.json.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "evaluation.json"
    if not path.exists():
        return {}
    try:
        return TypeAdapter(dict[str, Scores]).validate_json(path.read_bytes())
    except ValueError:
        raise UserError("run.output", f"{path} is damaged; remove it, and its scores are measured again") from None
