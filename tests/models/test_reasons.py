"""What a line says about a failure whose own text would say nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dmdr_models.base.json_files import first, parse_json
from dmdr_models.base.reasons import reason
from dmdr_models.folder.safetensors_header import read_header, read_metadata


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n  line"), "one line"),
        (KeyError("sample_size"), "there is no entry 'sample_size'"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (
            AttributeError("'list' object has no attribute 'get'"),
            "AttributeError: 'list' object has no attribute 'get'",
        ),
        (EOFError(), "EOFError"),
    ],
)
def test_reasons(error: Exception, line: str) -> None:
    assert reason(error) == line


@pytest.mark.parametrize("content", ["[]", "1", "null", '"text"'])
def test_json_is_an_object(content: str) -> None:
    with pytest.raises(ValueError, match=r"^a\.json is not a JSON object$"):
        parse_json(content.encode(), "a.json")


def test_first() -> None:
    assert [first(entry) for entry in (None, [], {}, 1, "text", ["a", "b"])] == [None] * 5 + ["a"]


@pytest.mark.parametrize(
    ("header", "read"),
    [
        ({"a": []}, read_header),
        ({"a": {"dtype": "F32"}}, read_header),
        ({"a": {"dtype": 1, "shape": [1]}}, read_header),
        ({"a": {"dtype": "F32", "shape": ["1"]}}, read_header),
        ({"__metadata__": []}, None),
        ({"__metadata__": [1]}, read_metadata),
    ],
)
def test_a_header_has_dtypes_and_shapes(tmp_path: Path, header: Any, read: Callable[[Path], Any] | None) -> None:
    file, content = tmp_path / "a.safetensors", json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    if read is None:
        assert read_header(file) == {}
        return
    with pytest.raises(ValueError, match=r"a\.safetensors is no safetensors file: "):
        read(file)
