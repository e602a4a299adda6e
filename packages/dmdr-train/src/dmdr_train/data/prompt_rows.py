"""The rows of a file of prompts: .txt, .jsonl, .csv, .tsv or .parquet, read one after the other.

Errors name the line, and how to mend it. Nothing slow is imported, so that a recipe's prompts are checked at once.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dmdr_models.base.text_files import text_lines
from dmdr_rewards.base.csv_files import Rows, csv_rows, unique

if TYPE_CHECKING:
    from pyarrow import DataType

USUAL_COLUMNS = ("prompt", "caption", "text")


class Column(NamedTuple):
    """Whether a column holds texts, and beside them something else: a line that names the first such row, or ""."""

    is_text: bool
    mixed: str = ""


def text_rows(path: Path) -> Rows:
    """The lines of a text file that are not blank, in the column `text`."""
    return ((number, {"text": line}) for number, line in text_lines(path) if line.strip())


def json_rows(path: Path) -> Rows:
    """The objects of a file with one JSON object per line.

    Raises:
        ValueError: a line is something else, or holds half a surrogate pair, which is no character.
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # without the position, whose line is not that of the file
            raise ValueError(f"line {number} of {path} is not JSON ({reason}); give one object per line") from None
        if not isinstance(row, dict):
            raise ValueError(f'line {number} of {path} is no object; give lines such as {{"prompt": "a cat"}}')
        if "\\ud" in line.lower():
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"line {number} of {path} cannot be UTF-8 ({error.reason}); mend it") from None
        yield number, row


READERS: dict[str, Callable[[Path], Rows]] = {
    ".txt": text_rows,
    ".jsonl": json_rows,
    ".csv": partial(csv_rows, delimiters=",;\t"),
    ".tsv": partial(csv_rows, delimiters="\t"),
}
SUFFIXES = (*READERS, ".parquet")


def columns_of(path: Path, wanted: str | None = None) -> dict[str, Column]:
    """The columns of a file. A text file is read whole, so that a mistake shows early.

    Args:
        wanted: the column that the user names.

    Raises:
        ValueError: the file is empty or damaged, or has another format than its suffix says.
    """
    columns = _parquet_columns(path, wanted) if path.suffix.lower() == ".parquet" else _read_columns(path)
    if not columns:
        raise ValueError(f"{path} holds no prompt; put some there")
    return columns


def _parquet_columns(path: Path, wanted: str | None) -> dict[str, Column]:
    from pyarrow import parquet

    try:
        found = parquet.read_metadata(path)
        schema = found.schema.to_arrow_schema()
    except Exception as error:  # readers of damaged files raise any exception
        raise ValueError(f"{path} cannot be read: {error}; give a .parquet file") from None
    unique(schema.names, path)
    usual = (wanted, *USUAL_COLUMNS)
    return {field.name: Column(is_text(field.type, field.name in usual)) for field in schema if found.num_rows}


def _read_columns(path: Path) -> dict[str, Column]:
    texts: dict[str, bool] = {}
    others: dict[str, str] = {}
    for number, row in READERS[path.suffix.lower()](path):
        for name, value in row.items():
            texts[name] = texts.get(name, False) or isinstance(value, str)
            if value is not None and not isinstance(value, str):
                others.setdefault(name, _no_text(path, number, name, value))
    return {name: Column(is_text, others.get(name, "")) for name, is_text in texts.items()}


def _no_text(path: Path, number: int, column: str, value: Any) -> str:
    return f"line {number} of {path} has no text in {column}, but {value!r:.40}; give texts or null"


def is_text(kind: "DataType", binary: bool) -> bool:
    """Whether a column of a parquet file holds texts.

    Args:
        binary: whether bytes are taken for texts in UTF-8, as some programs write them.
    """
    from pyarrow import types

    name = str(kind.value_type if types.is_dictionary(kind) else kind)
    return name in ("string", "large_string", "string_view") or (
        binary and name in ("binary", "large_binary", "binary_view")
    )


def batches_of(path: Path, column: str, size: int = 10_000) -> Iterator[list[str]]:
    """The texts of a column that are not blank, without the white space around them, about `size` at a time.

    Raises:
        ValueError: the file is damaged, or a row holds something else.
    """
    batch: list[str] = []
    for number, text in _values(path, column, size):
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(_no_text(path, number, column, text))
        if text := text.removeprefix("\ufeff").strip():
            batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _values(path: Path, column: str, size: int) -> Iterator[tuple[int, Any]]:
    if path.suffix.lower() == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(path) as file:
                rows = (
                    text
                    for batch in file.iter_batches(size, columns=[column])
                    for text in batch.column(0).cast(pyarrow.string()).to_pylist()
                )
                yield from enumerate(rows, 1)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}; mend the file") from error
    else:
        for number, row in READERS[path.suffix.lower()](path):
            yield number, row.get(column)
