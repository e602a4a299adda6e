"""The output of dmdr-score: one row per picture, in .parquet, .jsonl or .csv, and how a run goes on after a kill.

While a run lasts, its rows are appended to a journal beside the output, OUTPUT.partial.jsonl, one line per batch; a
last line that a kill has torn is dropped. The output itself appears in one move at the end, and the journal goes.
"""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dmdr_rewards.base.errors import UserError, naming
from dmdr_rewards.base.safe_reading import from_json

ENDINGS = (".parquet", ".jsonl", ".csv")
Row: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Columns:
    """What a row holds, in order: name -> type.

    rewards     a float column each: the raw score, None where there is none
    provenance  text columns that say how the scores were made, the same in every row
    """

    rewards: tuple[str, ...]
    provenance: tuple[str, ...]

    @property
    def types(self) -> dict[str, type]:
        """file_name, prompt, label, the rewards, total, error, and where the scores come from."""
        return {
            "file_name": str,
            "prompt": str,
            "label": int,
            **dict.fromkeys(self.rewards, float),
            "total": float,
            "error": str,
            **dict.fromkeys(self.provenance, str),
        }


class ScoreTable:
    """The output at `path`, and its journal.

    Raises UserError for another ending, and for a folder that does not exist.
    """

    def __init__(self, path: Path, columns: Columns, overwrite: bool = False) -> None:
        if path.suffix.lower() not in ENDINGS:
            raise UserError("--output", f"{path} must end in {', '.join(ENDINGS)}")
        if not path.parent.is_dir():
            raise UserError("--output", f"{path.parent}: no such folder")
        self.path = path
        self.columns = columns
        self.journal = path.with_name(f"{path.name}.partial.jsonl")
        if overwrite:
            self.journal.unlink(missing_ok=True)
        self.done: dict[Key, Row] = {} if overwrite else {**by_key(self._finished()), **by_key(self._journalled())}
        """What is scored already. A finished output's failures are not among it: they are tried again."""

    def refuse_unless_made_by(self, provenance: dict[str, str | None]) -> None:
        """Raise UserError if a row of an earlier run has other columns, or other text in these."""
        for row in self.done.values():
            if row.keys() != self.columns.types.keys():
                self._refuse(
                    f"has the columns {', '.join(map(str, row))}; this run has {', '.join(self.columns.types)}"
                )
            for name, value in provenance.items():
                if row[name] != value:
                    self._refuse(f"was made with {name} {row[name]}; this run has {value}")

    def refuse_unless_among(self, wanted: Container[Key]) -> None:
        """Raise UserError if an earlier run scored a picture that is not wanted, or under another prompt."""
        for key in self.done:
            if key not in wanted:
                name, prompt, label, _ = key
                under = f"label {label}" if label is not None else f"prompt {prompt!r}"
                self._refuse(f"scores {name} under {under}, which is not among this run's pictures and prompts")

    def append(self, rows: dict[Key, Row]) -> None:
        """Put the rows of a whole batch into the journal: all of them survive a kill, or none."""
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(list(rows.values())) + "\n")
        self.done.update(rows)

    def finish(self, rows: Sequence[Row]) -> None:
        """Replace the output by these rows in one move, and remove the journal."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            _WRITERS[self.path.suffix.lower()](partial, rows, self.columns.types)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def _finished(self) -> list[Row]:
        if not self.path.exists():
            return []
        with naming("--output"):
            rows = _checked(_read(self.path, self.columns.types), self.columns.types)
            return [row for row in rows if not row.get("error")]

    def _journalled(self) -> list[Row]:
        if not self.journal.exists():
            return []
        data = self.journal.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.journal, whole)
        try:
            rows = [row for line in data[:whole].splitlines() for row in from_json(line)]
            return _checked(rows, self.columns.types)
        except (ValueError, TypeError):
            raise UserError("--output", f"{self.journal} is damaged: remove it, or give --overwrite") from None

    def _refuse(self, why: str) -> None:
        found = self.path if self.path.exists() else self.journal
        raise UserError("--output", f"{found} {why}; give another -o, or --overwrite to score all anew")


def by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    """Rows by what identifies them: name, prompt and label, and a count where all three come again."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for row in rows:
        key = (row.get("file_name"), row.get("prompt") or "", row.get("label"))  # csv has no text that is not there
        found[(*key, seen[key])] = row
        seen[key] += 1
    return found


def _read(path: Path, types: dict[str, type]) -> list[Row]:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                return [from_json(line) for line in file]
            return [
                {name: types.get(name, str)(text) if text else None for name, text in row.items()}
                for row in csv.DictReader(file)
            ]
    except OSError:
        raise
    except Exception as error:  # bytes of another format make readers fail in any way
        raise ValueError(f"{path} is no output of dmdr-score: {error}; remove it, or give another -o") from error


def _checked(rows: Sequence[Any], types: dict[str, type]) -> list[Row]:
    """Rows as they come out of a file -> the same. Raises ValueError for one that holds what no run would write."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no row of scores: {str(row)[:80]}")
        for name, value in row.items():
            if name in types and not _fits(value, types[name]):
                raise ValueError(f"row {number} is no row of scores, {name} is {str(value)[:80]}")
    return list(rows)


def _fits(value: Any, kind: type) -> bool:
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return abs(value) < math.inf
    return value is None or (isinstance(value, kind) and not isinstance(value, bool))


def _write_parquet(path: Path, rows: Sequence[Row], types: dict[str, type]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrow = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    arrays = {name: pa.array([row[name] for row in rows], arrow[kind]) for name, kind in types.items()}
    pq.write_table(pa.table(arrays), path)


def _write_jsonl(path: Path, rows: Sequence[Row], types: dict[str, type]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_csv(path: Path, rows: Sequence[Row], types: dict[str, type]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(types))
        table.writeheader()
        table.writerows(rows)


_WRITERS = {".parquet": _write_parquet, ".jsonl": _write_jsonl, ".csv": _write_csv}
