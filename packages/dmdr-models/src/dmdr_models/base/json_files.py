"""JSON from files of others: whatever is wrong with it is a ValueError."""

import json
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(file.read_bytes(), file)


def parse_json(content: bytes, where: str | Path) -> Any:
    """The same for bytes that `where` holds."""
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"the brackets of {where} are nested too deeply") from None
