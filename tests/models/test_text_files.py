"""Text files of every kind that people have: the same lines from each, and one clear line about the others."""

from argparse import Namespace
from pathlib import Path

import pytest
from dmdr_models.base.errors import UsageError
from dmdr_models.base.text_files import text_lines, text_prompts
from dmdr_models.drawing.prompts import read_texts

WITHIN = "a\u2028b\u2029c\vd\fe\x85f\x1cg\x1dh\x1ei"
"""A prompt with every character at which `str.splitlines` splits, except line ends."""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_end_and_mark(tmp_path: Path, end: str, mark: str, last: bool) -> None:
    file = tmp_path / "p.txt"
    lines = ["  a cat\t ", "", " \t", WITHIN, "“ö”, 猫"]
    file.write_bytes((mark + end.join(lines) + (end if last else "")).encode())
    assert list(text_lines(file)) == list(enumerate(lines, 1))
    assert text_prompts(file) == ["a cat", WITHIN, "“ö”, 猫"]
    assert read_texts(Namespace(prompts=str(file), texts=[])) == ["a cat", WITHIN, "“ö”, 猫"]


def test_joined_files_keep_no_mark(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa\n\ufeffb\n".encode())
    assert text_prompts(tmp_path / "p.txt") == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a cat".encode("utf-16"), r"p.txt is UTF-16 or UTF-32; save it as UTF-8$"),
        (b"\xfe\xff" + "a cat".encode("utf-16-be"), r"p.txt is UTF-16 or UTF-32; save it as UTF-8$"),
        ("a cat".encode("utf-32"), r"p.txt is UTF-16 or UTF-32; save it as UTF-8$"),
        ("a cat".encode("utf-16-le"), r"line 1 of .*p.txt holds a NUL, as UTF-16 does; save it as UTF-8$"),
        (b"fine\n\ncaf\xe9\n", r"line 3 of .*p.txt is not UTF-8 \(invalid continuation byte\); save it as UTF-8$"),
        (b"fine\r\xff", r"line 2 of .*p.txt is not UTF-8 \(invalid start byte\); save it as UTF-8$"),
        (b"half \xed\xa0\x80", r"line 1 of .*p.txt is not UTF-8 \(invalid continuation byte\); save it as UTF-8$"),
    ],
)
def test_what_is_no_utf_8_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        list(text_lines(tmp_path / "p.txt"))
    with pytest.raises(UsageError, match=f"^--prompts: .*{said}"):
        read_texts(Namespace(prompts=str(tmp_path / "p.txt"), texts=[]))


@pytest.mark.parametrize("name", ["p.csv", "p.TSV", "p.jsonl", "p.json", "p.parquet"])
def test_a_table_is_no_list_of_prompts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("prompt\na cat, asleep\n")
    with pytest.raises(UsageError, match=f"{name} is a table: give a text file with one prompt per line$"):
        read_texts(Namespace(prompts=str(tmp_path / name), texts=[]))
