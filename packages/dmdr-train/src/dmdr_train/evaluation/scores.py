"""The scores of a set of pictures, and evaluation.json with the scores of a run."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.base.errors import UserError


@dataclass(frozen=True)
class Scores:
    """Scores of one set of pictures against the reference set; `more` has scores by the reference and by rewards."""

    name: str
    frechet: float
    precision: float
    recall: float
    accuracy: float
    frechet_pixels: float
    inception: float | None = None
    more: dict[str, float] = field(default_factory=dict)


def save_scores(folder: Path, scores: dict[str, Scores]) -> None:
    """Write the scores of a run to evaluation.json, so that a resumed run need not measure them again."""
    text = json.dumps({key: asdict(value) for key, value in scores.items()}, indent=2)
    write_whole(folder / "evaluation.json", lambda path: path.write_text(text, encoding="utf-8"))


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
