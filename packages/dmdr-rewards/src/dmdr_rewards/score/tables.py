"""Tables of pictures or prompts: .jsonl, .csv and .parquet files, and the prompt and label in a row."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmdr_rewards.base.errors import UserError
from dmdr_rewards.base.safe_reading import from_json

ENDINGS = (".parquet", ".jsonl", ".csv")
LIGHT = ("file_name", "prompt", "label")
"""The columns that are read as a whole. The column `image` may hold pictures, which are read one by one."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; of a parquet file, its columns in `LIGHT` only.

    Raises ValueError or OSError for a file that is missing, damaged or has another ending.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: give a file that ends in {', '.join(ENDINGS)}")
    if path.suffix.lower() != ".parquet":
        return read_lines(path)
    file = open_parquet(path)
    with readable(path):
        return file.read(columns=[name for name in LIGHT if name in file.schema_arrow.names]).to_pylist()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv or .jsonl file. Raises ValueError or OSError, as `read_rows` does."""
    with readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            return csv_rows(file, path)
        rows = []
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = from_json(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: give one object with `file_name` and `prompt` per line")
                rows.append(row)
        return rows


def csv_rows(file: Iterable[str], path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv file.

    Raises ValueError for a row with more fields than the header: its text would end at the first comma.
    """
    reader, rows = csv.DictReader(file), []
    for row in reader:
        if None in row:  # the name that DictReader gives to surplus fields
            fix = "put a text that holds commas in double quotes"
            raise ValueError(f"{path}, line {reader.line_num} has more fields than the header: {fix}")
        rows.append(row)
    return rows


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises ValueError or OSError for a file that is missing or no parquet file."""
    import pyarrow.parquet as pq

    with readable(path):
        return pq.ParquetFile(path)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn any failure of a reader into a ValueError that names the file. Damaged bytes can raise any exception."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def prompt_and_label(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt (text or None) and the class label (integer or None) of a row.

    Raises ValueError for a label that is not an integer.
    """
    prompt, label = row.get("prompt"), row.get("label")
    return {
        "prompt": None if prompt is None else writable(prompt),
        "label": None if label is None or label == "" else class_label(label, row.get("file_name", "a picture")),
    }


def class_label(value: Any, where: Any) -> int:
    """The value as a 64-bit integer. Raises ValueError for any other value; `where` says where it was found."""
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        number = int(value)
        if abs(number) >= 1 << 63:
            raise ValueError
        return number
    except (TypeError, ValueError):
        raise ValueError(f"label {value!r} of {where} is not an integer: give class labels, counted from 0") from None


def writable(value: Any) -> str:
    """The value as text that every output format can store.

    Half of a surrogate pair, from a file name or a truncated JSON string, becomes a question mark.
    """
    return str(value).encode("utf-8", "replace").decode("utf-8")
