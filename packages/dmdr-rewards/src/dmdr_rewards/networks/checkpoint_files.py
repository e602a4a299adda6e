"""Reading tensors from files that may come from anywhere.

No code in a file is ever run, and a file is used only if its tensors are exactly those that are expected.
"""

import functools
import hashlib
import pickle
import re
import zipfile
from collections.abc import Callable, Hashable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

T = TypeVar("T")

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Endings of files of weights."""

_LISTED = 12  # names of each kind in an error message
_loaded: WeakValueDictionary[tuple[Hashable, ...], Any] = WeakValueDictionary()


def load(path: str | PathLike[str], inside: str | None = None) -> dict[str, Tensor]:
    """Read a file of named tensors onto the CPU, memory-mapped where the format allows it.

    A name ending in .safetensors is read as that, anything else as a `torch.save` file with `weights_only=True`.
    `inside` names the entry that holds the tensors in files that wrap them; without such an entry the file itself does.
    Raises ValueError for a file that is missing, damaged, of another format, or that holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path}: no such file")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(tensors, dict) and inside in tensors:
        tensors = tensors[inside]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"checkpoint {path}: holds more than named tensors; give the state dict alone")
    return tensors


def find(folder: Path, *names: str) -> Path:
    """The first of these files that the folder has. Raises ValueError, listing the names, if it has none."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"checkpoint {folder} must be a folder with {' or '.join(names)}")


def sha256(path: str | PathLike[str]) -> str:
    """Hash of a file's bytes, or of a folder's files of weights and their names; 64 hexadecimal digits.

    A file is read once; its hash is kept for as long as its size and time of change stay. Raises ValueError for a path
    that does not exist, and for a folder without weights.
    """
    path = Path(path).resolve()
    if path.is_file():
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    files = sorted(file for file in path.glob("*") if file.suffix in WEIGHTS)
    if not files:
        raise ValueError(f"checkpoint {path}: no such file, nor a folder with weights ({', '.join(WEIGHTS)})")
    return hashlib.sha256("".join(f"{sha256(file)}  {file.name}\n" for file in files).encode()).hexdigest()


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: str | PathLike[str]) -> None:
    """Raise ValueError, naming every offender, unless `tensors` has exactly these names and shapes."""
    refuse_unless_exact(
        path,
        missing=shapes.keys() - tensors.keys(),
        unexpected=tensors.keys() - shapes.keys(),
        wrong=[
            f"{name} {tuple(tensors[name].shape)}, expected {shape}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    )


def assign(module: nn.Module, tensors: Mapping[str, Tensor], path: str | PathLike[str]) -> None:
    """Let a module, built without memory, take over the tensors of the file `path`. Raises what `check` raises."""
    check(tensors, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, path)
    module.load_state_dict(tensors, assign=True)


def shared(path: Path, load: Callable[[], T], *how: Hashable) -> T:
    """What `load` makes of the file `path`: one object for equal bytes and equal `how`, while anything uses it.

    how  all else that the object depends on. Raises ValueError for a path that does not exist, and what `load` raises.
    """
    key = (sha256(path), *how)
    loaded = _loaded.get(key) or load()
    _loaded[key] = loaded
    return loaded


def refuse_unless_exact(
    path: str | PathLike[str],
    missing: "set[str] | list[str]",
    unexpected: "set[str] | list[str]",
    wrong: list[str],
) -> None:
    """Raise ValueError that lists whatever is missing, unexpected or of a wrong shape; nothing, if nothing is."""
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong shape": sorted(wrong)}
    faults = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise ValueError(f"checkpoint {path} is not of this model; {'; '.join(faults)}")


def refuse_unless_loaded(path: str | PathLike[str], report: Mapping[str, Any]) -> None:
    """The same of what transformers' `from_pretrained(…, output_loading_info=True)` reports."""
    mismatched = report["mismatched_keys"]
    refuse_unless_exact(
        path,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        wrong=[f"{name} {tuple(found)}, expected {tuple(shape)}" for name, found, shape in mismatched],
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, size: int, changed: int) -> str:
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb") as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {path} is damaged, or no safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        # Only torch's zip format can be mapped; files from before torch 1.6 are read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own text advises weights_only=False, which is what this module is there to prevent.
        reason = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"checkpoint {path} was refused, none of its code was run: it is damaged, or holds non-tensors"
            f"{f', such as {reason[1]}' if reason else ''}"
        ) from error
    except Exception as error:  # bytes that are no pickle at all make the unpickler fail in any way
        raise ValueError(f"checkpoint {path} is damaged, or no torch file: {error}") from error
