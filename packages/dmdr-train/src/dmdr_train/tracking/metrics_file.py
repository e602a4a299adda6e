"""metrics.jsonl: the logged rows of a run, one line of JSON per row."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmdr_rewards.base.safe_reading import from_json

from dmdr_train.base.atomic_files import settle, write_whole

METRICS = "metrics.jsonl"


class Rows:
    """Appends rows to metrics.jsonl. The file only ever gets complete lines.

    Rows that cannot be written, such as on a full disk, are kept in `waiting` and written later.

    Args:
        path: the file; it is made with its first row.
    """

    def __init__(self, path: Path):
        self.path = path
        self.waiting: list[str] = []

    def drop_after(self, step: int) -> None:
        """Rewrite the file without the rows after `step`, which a resumed run logs again, and without damaged lines.

        Raises:
            OSError: the file cannot be written; it is unchanged.
        """
        if not self.path.exists():
            return
        found = read_metrics(self.path.parent)
        if damaged := self.path.read_bytes().count(b"\n") - len(found):
            warning = f"warning: {damaged} lines of {self.path} cannot be read, and are removed"
            print(warning, file=sys.stderr, flush=True)
        text = "".join(f"{json.dumps(row)}\n" for row in found if row["step"] <= step)
        write_whole(self.path, lambda new: new.write_text(text, encoding="utf-8"))

    def add_missing(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Add those rows whose steps are not in the file, such as rows that were saved with a checkpoint."""
        known = {row["step"] for row in read_metrics(self.path.parent)}
        for row in rows:
            if row["step"] not in known:
                self.add(row)

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row, or keep it waiting if it cannot be written."""
        self.waiting.append(json.dumps(row))
        self.write()

    def write(self) -> None:
        """Append the waiting rows; if that fails, they go on waiting."""
        with contextlib.suppress(OSError):
            self.finish()

    def finish(self) -> None:
        """Append the waiting rows.

        Raises:
            OSError: they cannot be written; the file is unchanged.
        """
        if not self.waiting:
            return
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self.waiting))
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            raise
        self.waiting = []

    def settle(self) -> None:
        """Wait until the written rows are on the disk, so that a later checkpoint never exists without its rows."""
        with contextlib.suppress(OSError):
            settle(self.path)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.jsonl; an empty list if the file does not exist.

    Damaged lines are left out, such as a last line that is incomplete after a power failure.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            rows += [row] if _is_row(row := from_json(line)) else []
    return rows


def _is_row(found: Any) -> bool:
    values = found.values() if isinstance(found, dict) else [None]
    return all(isinstance(value, int | float) for value in values) and isinstance(found.get("step"), int)
