"""JSON objects from files of others: whatever is wrong with one is a ValueError."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> dict[str, Any]:
    """The entries of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, not JSON, not an object, or nested too deeply.
    """
    return parse_json(file.read_bytes(), file)


def parse_json(content: bytes, where: str | Path) -> dict[str, Any]:
    """The same for bytes that `where` holds."""
    try:
        found = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"the brackets of {where} are nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} is not a JSON object")
    return found


def first(entry: Any) -> Any:
    """The first item of an entry; None if the entry is no list, or an empty one."""
    return entry[0] if isinstance(entry, list) and entry else None
