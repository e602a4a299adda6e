"""What the header of a .safetensors file says, without torch and without reading a weight."""

from pathlib import Path
from typing import Any

from dmdr_models.base.json_files import parse_json

TORCHAO_WEIGHT = "._weight_qdata"
"""What torchao calls the main part of a quantised weight, which it writes in several tensors."""


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a file by name, each with its dtype, such as "F32", and its shape, a list.

    Raises:
        ValueError: it is no safetensors file.
    """
    header = _whole_header(file)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not _is_shape(entry.get("shape")):
            raise ValueError(f"{file} is no safetensors file: {name} has no dtype, or no shape")
    return header


def read_metadata(file: Path) -> dict[str, str]:
    """What the writer of a file noted in its header; empty if it noted nothing.

    Raises:
        ValueError: it is no safetensors file.
    """
    found = _whole_header(file).get("__metadata__") or {}
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no safetensors file: its metadata is not a JSON object")
    return found


def _is_shape(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(side, int) for side in found)


def _whole_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 2 <= size <= file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file")
        return parse_json(stream.read(size), file)


def layers_in(file: Path) -> list[str]:
    """The names of the linear and convolution layers whose weights a file holds.

    Raises:
        ValueError: it is no safetensors file.
    """
    found = []
    for name, entry in read_header(file).items():
        plain = f"{name.removesuffix(TORCHAO_WEIGHT)}.weight" if name.endswith(TORCHAO_WEIGHT) else name
        if plain.endswith(".weight") and len(entry["shape"]) > 1 and "embed.weight" not in plain:
            found.append(plain.removesuffix(".weight"))
    return found
