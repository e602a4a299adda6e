"""The output of dmdr-score, one row per picture in .parquet, .jsonl or .csv, and its journal.

During a run, rows are appended to a journal beside the output, OUTPUT.partial.jsonl, one line per batch. A run that is
killed continues from the journal; an incomplete last line is dropped. At the end the output is written atomically and
the journal is removed.
"""

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dmdr_rewards.base.atomic_files import settle_names, write_whole
from dmdr_rewards.base.errors import UserError, naming
from dmdr_rewards.base.safe_reading import from_json

Row: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Columns:
    """The columns of the output, in order.

    rewards     float columns with the raw scores; None for a picture without a score
    provenance  text columns that say how the scores were made, the same in every row
    """

    rewards: tuple[str, ...]
    provenance: tuple[str, ...]

    @property
    def types(self) -> dict[str, type]:
        """Name -> type: file_name, prompt, label, the rewards, total, error, note, and the provenance."""
        return {
            "file_name": str,
            "prompt": str,
            "label": int,
            **dict.fromkeys(self.rewards, float),
            "total": float,
            "error": str,
            "note": str,
            **dict.fromkeys(self.provenance, str),
        }


class ScoreTable:
    """The output at `path`, and its journal.

    overwrite  ignore the rows of earlier runs

    Raises UserError for another ending, a folder that does not exist, and a damaged file of an earlier run.
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
        """Rows of earlier runs. Pictures with an error in a finished output are left out, so they are tried again."""

    def refuse_unless_made_by(self, provenance: dict[str, str | None]) -> None:
        """Raise UserError if an earlier run's row has other columns, or other values in these columns."""
        for row in self.done.values():
            if row.keys() != self.columns.types.keys():
                self._refuse(
                    f"has the columns {', '.join(map(str, row))}; this run has {', '.join(self.columns.types)}"
                )
            for name, value in provenance.items():
                if row[name] != value:
                    self._refuse(f"was made with {name} {row[name]}; this run has {value}")

    def refuse_unless_among(self, wanted: Container[Key]) -> None:
        """Raise UserError if an earlier run scored a picture that is not wanted, or used another prompt."""
        for key in self.done:
            if key not in wanted:
                name, prompt, label, _ = key
                under = f"label {label}" if label is not None else f"prompt {prompt!r}"
                self._refuse(f"scores {name} under {under}, which is not among this run's pictures and prompts")

    def append(self, rows: dict[Key, Row]) -> None:
        """Append the rows of a batch to the journal. After a kill either all or none of them are there."""
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(list(rows.values())) + "\n")
        self.done.update(rows)

    def finish(self, rows: Sequence[Row]) -> None:
        """Write these rows to the output atomically, and remove the journal."""
        write = _WRITERS[self.path.suffix.lower()]
        write_whole(self.path, lambda partial: write(partial, rows, self.columns.types))
        settle_names(self.path.parent)  # the journal must outlive the output's rename
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
    """Rows by their identity: name, prompt and label, and a count for rows that agree in all three."""
    seen: Counter[tuple[Any, ...]] = Counter()
    found = {}
    for row in rows:
        key = (
            row.get("file_name"),
            row.get("prompt") or "",
            row.get("label"),
        )  # csv has no None
        found[(*key, seen[key])] = row
        seen[key] += 1
    return found


def _read(path: Path, types: dict[str, type]) -> list[Row]:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path).to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:  # a spreadsheet puts a byte-order mark there
            if path.suffix.lower() == ".jsonl":
                return [from_json(line) for line in file]
            return list(_csv_rows(file, types))
    except OSError:
        raise
    except Exception as error:  # readers raise any exception for damaged bytes
        raise ValueError(f"{path} is not an output of dmdr-score: {error}; remove it, or give another -o") from error


def _csv_rows(file: Iterable[str], types: dict[str, type]) -> Iterator[Row]:
    """The rows as they were written: white space and line ends inside of prompts are kept."""
    reader = csv.DictReader(file, strict=True)
    for row in reader:
        if None in row or None in row.values():  # DictReader's marks of a longer and of a shorter row
            raise ValueError(f"line {reader.line_num} has another number of fields than the header")
        yield {name: types.get(name, str)(text) if text else None for name, text in row.items()}


def _checked(rows: Sequence[Any], types: dict[str, type]) -> list[Row]:
    """Rows of a file, unchanged. Raises ValueError for a row with a value that dmdr-score does not write."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a row of scores: {str(row)[:80]}")
        for name, value in row.items():
            if name in types and not _fits(value, types[name]):
                raise ValueError(f"row {number} is not a row of scores, {name} is {str(value)[:80]}")
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
ENDINGS = tuple(_WRITERS)
