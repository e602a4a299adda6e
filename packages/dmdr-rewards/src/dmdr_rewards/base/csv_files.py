"""Tables of separated fields as people have them: the header shows the separator, and every row must fit the header."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dmdr_rewards.base.text_files import text_lines

Rows = Iterator[tuple[int, dict[str, Any]]]
"""Rows, with the numbers of the lines in which they end."""


def csv_rows(path: Path, delimiters: str) -> Rows:
    """The rows of a table whose first line names the columns; all fields are texts, and blank rows are left out.

    Between tabs, quotes that surround no field are part of the text.

    Args:
        delimiters: the characters that may separate fields. The header shows which of them does.

    Raises:
        ValueError: a row has more or fewer fields than the header, quotes are wrong, or other characters separate the
            fields.
    """
    first = next((line for _, line in text_lines(path) if line.strip()), "")
    fitting = [each for each in delimiters if len(next(csv.reader([first], delimiter=each))) > 1]
    if len(fitting) > 1:
        raise ValueError(f"the header of {path} has {' and '.join(map(repr, fitting))}; separate it by one of them")
    if not fitting and "|" in first:
        raise ValueError(f"the header of {path} is separated by '|'; separate the columns by {delimiters[0]!r}")
    delimiter = (fitting or delimiters)[0]
    reader = _reader(path, delimiter, csv.QUOTE_NONE if _quotes_are_text(path, delimiter) else csv.QUOTE_MINIMAL)
    header: list[str] = []
    try:
        for row in reader:
            if not any(field.strip() for field in row):
                continue
            if not header:
                header = unique([name.strip() for name in row], path)
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"line {reader.line_num} of {path} has {len(row)} fields and the header {len(header)}; put quotes "
                    f"around texts that contain {reader.dialect.delimiter!r} or a line end"
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path} cannot be read: {error}; mend its quotes") from None


def _reader(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Any:
    # Line ends are put back for texts of several lines, which stand in quotes.
    lines = (f"{line}\n" for _, line in text_lines(path))
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True)


def _quotes_are_text(path: Path, delimiter: str) -> bool:
    """Whether a table of tabs has quotes that surround no field, as in PartiPrompts.tsv."""
    if delimiter != "\t":
        return False
    try:
        rows = _reader(path, delimiter, csv.QUOTE_MINIMAL)
        return len({len(row) for row in rows if any(field.strip() for field in row)}) > 1
    except csv.Error:
        return True


def unique(header: list[str], path: Path) -> list[str]:
    """Return the names of the columns.

    Raises:
        ValueError: two columns have the same name.
    """
    for i, name in enumerate(header):
        if name in header[:i]:
            raise ValueError(f"the header of {path} names two columns {name!r}; rename one")
    return header
