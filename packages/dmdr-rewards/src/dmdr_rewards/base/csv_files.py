"""Tables of separated fields as people have them: the header shows the separator, and every row must fit the header."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dmdr_rewards.base.text_files import text_lines

Rows = Iterator[tuple[int, dict[str, Any]]]
"""Rows, with the numbers of the lines in which they end."""


def csv_rows(path: Path, delimiters: str) -> Rows:
    """The rows of a table whose first line names the columns; all fields are texts, and blank rows are left out.

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
    # Line ends are put back for texts of several lines, which stand in quotes.
    lines = (f"{line}\n" for _, line in text_lines(path))
    reader = csv.reader(lines, delimiter=(fitting or delimiters)[0], skipinitialspace=True, strict=True)
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


def unique(header: list[str], path: Path) -> list[str]:
    """Return the names of the columns.

    Raises:
        ValueError: two columns have the same name.
    """
    for i, name in enumerate(header):
        if name in header[:i]:
            raise ValueError(f"the header of {path} names two columns {name!r}; rename one")
    return header
