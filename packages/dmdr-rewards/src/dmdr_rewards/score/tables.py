"""Tables of pictures or prompts: .jsonl, .json, .csv, .tsv and .parquet files, and the prompt and label in a row."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmdr_rewards.base.csv_files import csv_rows
from dmdr_rewards.base.errors import UserError
from dmdr_rewards.base.safe_reading import from_json
from dmdr_rewards.base.text_files import text_lines, text_prompts

ENDINGS = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
PROMPTS = ("prompt", "caption", "text")
"""The columns that may hold prompts. The first of them that is not null is a row's prompt."""
LIGHT = ("file_name", *PROMPTS, "label")
"""The columns that are read as a whole. The column `image` may hold pictures, which are read one by one."""
_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table; of a parquet file, its columns in `LIGHT` only.

    Raises ValueError or OSError for a file that is missing, damaged or has another ending.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: give a file that ends in {', '.join(ENDINGS)}, or .txt for prompts in order")
    if path.suffix.lower() != ".parquet":
        return read_lines(path)
    file = open_parquet(path)
    with readable(path):
        return file.read(columns=[name for name in LIGHT if name in file.schema_arrow.names]).to_pylist()


def texts_in_order(path: Path) -> list[str] | None:
    """The prompts of a .txt file, one per line, or of a .json file with one list of texts; None for another file.

    Raises ValueError or OSError, as `read_rows` does.
    """
    with readable(path):
        if path.suffix.lower() == ".txt":
            return text_prompts(path)
        if path.suffix.lower() == ".json":
            found = _list(path)
            return found if found and all(isinstance(text, str) for text in found) else None
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv, .tsv, .jsonl or .json file. A .json file holds one list of objects.

    The header of a .csv file shows whether commas, semicolons or tabs separate its fields. Raises ValueError or
    OSError, as `read_rows` does, and ValueError for a row with more or fewer fields than the header.
    """
    ending = path.suffix.lower()
    with readable(path):
        if ending in _DELIMITERS:
            return [row for _, row in csv_rows(path, _DELIMITERS[ending])]
        if ending == ".json":
            return [_object(row, f"{path}, entry {number}") for number, row in enumerate(_list(path), 1)]
        return [_json_row(line, f"{path}, line {number}") for number, line in text_lines(path) if line.strip()]


def _list(path: Path) -> list[Any]:
    found = from_json("\n".join(line for _, line in text_lines(path)))
    if not isinstance(found, list):
        raise ValueError(f"{path} holds no list: give a list of objects, or one object per line in a .jsonl file")
    return found


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = from_json(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    return _object(row, where)


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: give one object with `file_name` and `prompt`")
    return row


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile. Raises ValueError or OSError for a file that is missing or no parquet file."""
    import pyarrow.parquet as pq

    with readable(path):
        # Column chunks are read piece by piece: one may hold all pictures of the file.
        return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


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


def prompts_and_label(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompts (text or None) of a row, each with the class label (integer or None); at least one entry.

    A column may hold one text or a list of texts, as several captions of one picture. Raises ValueError for a label
    that is not an integer.
    """
    found = next((row[name] for name in PROMPTS if row.get(name) is not None), None)
    texts = found if isinstance(found, list) and found else [None if found == [] else found]
    label = row.get("label")
    if label == "":
        label = None
    elif label is not None:
        label = class_label(label, row.get("file_name", "a picture"))
    prompts = dict.fromkeys(None if text is None else writable(text) for text in texts)
    return [{"prompt": prompt, "label": label} for prompt in prompts]


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
