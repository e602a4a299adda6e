"""Which checkpoints are kept, and how the others are removed."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dmdr_train.checkpoint.find import checkpoints_in


def prune(folder: Path, step: int, last: int, every: int, best: int | None) -> None:
    """Remove the checkpoints that none of these keeps, and those after `step`, which are of steps to be made again.

    Args:
        step: of the newest.
        last: number of the newest to keep.
        every: keep those at a multiple of so many steps; 0 for none.
        best: a step to keep.
    """
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints_in(folder)}
    kept = kept_steps(found, step, last, every, best)
    for number, path in found.items():
        if number not in kept:
            remove(path)


def kept_steps(steps: Iterable[int], step: int, last: int, every: int, best: int | None = None) -> set[int]:
    """The steps whose checkpoints `prune` keeps."""
    past = sorted(number for number in steps if number <= step)
    return {*past[-last:], *(n for n in past if n == best or (every and n % every == 0))}


def remove(path: Path) -> None:
    """Take a checkpoint out of sight, then away: half of one never has its name."""
    hidden = path.with_name(f".{path.name}.removed")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """What an earlier process had begun to write or to remove in a run's folder when it was killed."""
    files = ".*.[0-9]*.partial"
    for pattern in ("checkpoints/.step-*", ".*student.partial", files, f"samples/{files}", ".shared-*"):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
