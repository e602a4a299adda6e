"""Text files as people have them: UTF-8, with or without a byte-order mark, with the line ends of any system.

Every program reads its prompts through `text_lines`, so that a file holds the same prompts everywhere.
"""

from collections.abc import Iterator
from pathlib import Path

UTF_16_AND_32 = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
"""Their byte-order marks; the fourth, of UTF-32 in little-endian order, begins like the first."""


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    r"""Yield every line with its number, which begins at 1, and without its end.

    A line ends in \n, \r\n or \r. The other characters at which `str.splitlines` splits (\v, \f, \x1c to \x1e, \x85,
    U+2028, U+2029) are part of the text. A byte-order mark at the start of a line is left out, since files with such
    marks are joined.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8, or holds a NUL.
    """
    with open(path, "rb") as file:
        if file.read(4).startswith(UTF_16_AND_32):
            raise ValueError(f"{path} is UTF-16 or UTF-32; save it as UTF-8")
    # Bytes that are not UTF-8 become half a surrogate pair each, which shows them beside the line's number.
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                line.encode()
            except UnicodeEncodeError:
                raise ValueError(f"line {number} of {path} is not UTF-8 ({_reason(line)}); save it as UTF-8") from None
            if "\0" in line:
                raise ValueError(f"line {number} of {path} holds a NUL, as UTF-16 does; save it as UTF-8")
            yield number, line.removesuffix("\n").removeprefix("\ufeff")


def text_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, one per line, without the white space around them; blank lines are left out.

    Raises:
        OSError, ValueError: as `text_lines`.
    """
    return [text for _, line in text_lines(path) if (text := line.strip())]


def _reason(line: str) -> str:
    try:
        line.encode(errors="surrogateescape").decode()
    except UnicodeDecodeError as error:
        return error.reason
    return "unknown"
