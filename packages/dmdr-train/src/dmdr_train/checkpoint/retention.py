"""Decide which checkpoints are kept, and remove the others."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dmdr_train.checkpoint.find import checkpoints_in


def prune(folder: Path, step: int, last: int, every: int, best: int | None) -> None:
    """Remove the checkpoints that no rule keeps, and the checkpoints after `step`, since those steps are made again.

    Args:
        step: the step of the newest checkpoint.
        last: number of the newest checkpoints to keep.
        every: keep the checkpoints at multiples of this number of steps; 0 for none.
        best: a step whose checkpoint is kept, or None.
    """
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints_in(folder)}
    kept = kept_steps(found, step, last, every, best)
    for number, path in found.items():
        if number not in kept:
            remove(path)


def kept_steps(steps: Iterable[int], step: int, last: int, every: int, best: int | None = None) -> set[int]:
    """Return the steps whose checkpoints `prune` keeps."""
    past = sorted(number for number in steps if number <= step)
    return {*past[-last:], *(n for n in past if n == best or (every and n % every == 0))}


def remove(path: Path) -> None:
    """Rename a checkpoint, then delete it, so that an incomplete folder never has a checkpoint's name."""
    hidden = path.with_name(f".{path.name}.removed")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Remove files that an earlier process was writing or removing in a run's folder when it was killed."""
    files = ".*.[0-9]*.partial"
    for pattern in ("checkpoints/.step-*", ".*student.partial", files, f"samples/{files}", ".shared-*"):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
