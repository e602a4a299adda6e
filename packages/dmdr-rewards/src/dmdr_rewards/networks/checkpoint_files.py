"""Safe reading of checkpoint files: they may come from anywhere.

No code in a file is ever run, and a file is used only if it holds exactly the expected tensors.
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

from dmdr_rewards.base.errors import MissingError

T = TypeVar("T")

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Endings of checkpoint files."""

_WRAPPERS = ("module.", "_orig_mod.")
_LISTED = 4  # names of each kind in an error message
_loaded: WeakValueDictionary[tuple[Hashable, ...], Any] = WeakValueDictionary()


def load(path: str | PathLike[str], inside: str | None = None) -> dict[str, Tensor]:
    """Read a file of named tensors onto the CPU, memory-mapped where the format allows it.

    A .safetensors file is read as such, any other as a `torch.save` file with `weights_only=True`.

    inside  name of the entry that holds the tensors in some files; without such an entry, the file itself holds them

    A prefix that DistributedDataParallel or torch.compile put before every name is left out. Raises MissingError for a
    file that is not there, and ValueError for one that is damaged, of another format, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"checkpoint {path}: no such file")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(tensors, dict) and inside in tensors:
        tensors = tensors[inside]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"checkpoint {path}: holds more than named tensors; give the state dict alone")
    return _without_wrappers(tensors)


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS * 2:  # in either order
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def find(folder: Path, *names: str) -> Path:
    """The first of these files that exists in the folder. Raises MissingError that lists the names if none exists."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise MissingError(f"checkpoint {folder} must be a folder with {' or '.join(names)}")


def sha256(path: str | PathLike[str]) -> str:
    """SHA-256 of a file, or of the hashes and names of the checkpoint files in a folder; 64 hexadecimal digits.

    The hash of a file is cached until its size or modification time changes. Raises MissingError for a path that does
    not exist, and for a folder without checkpoint files.
    """
    path = Path(path).resolve()
    if path.is_file():
        stat = path.stat()
        return _sha256(path, stat.st_size, stat.st_mtime_ns)
    files = sorted(file for file in path.glob("*") if file.suffix in WEIGHTS)
    if not files:
        raise MissingError(f"checkpoint {path}: no such file, nor a folder with weights ({', '.join(WEIGHTS)})")
    return hashlib.sha256("".join(f"{sha256(file)}  {file.name}\n" for file in files).encode()).hexdigest()


def check(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: str | PathLike[str]) -> None:
    """Raise ValueError that lists all differences, unless `tensors` has exactly these names and shapes."""
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
    """Move the tensors of the file `path` into a module on the meta device. Raises ValueError as `check` does."""
    check(tensors, {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, path)
    module.load_state_dict(tensors, assign=True)


def load_once(path: Path, load: Callable[[], T], *how: Hashable) -> T:
    """The result of `load`, or the same object as before if one for equal bytes and an equal `how` is still in use.

    path  the file that `load` reads
    how   everything else that the result depends on

    Raises ValueError for a path that does not exist, and any error of `load`.
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
    """Raise ValueError that lists what is missing, unexpected or of a wrong shape, unless all three are empty."""
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "wrong shape": sorted(wrong)}
    faults = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise ValueError(f"checkpoint {path} is not of this model; {'; '.join(faults)}")


def refuse_unless_loaded(path: str | PathLike[str], report: Mapping[str, Any]) -> None:
    """Do the same with the report of transformers' `from_pretrained(…, output_loading_info=True)`."""
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
        raise ValueError(f"checkpoint {path} is damaged, or not a safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        # Only torch's zip format can be memory-mapped; files from before torch 1.6 are read as a whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own message advises weights_only=False, which would run the file's code.
        reason = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"checkpoint {path} was refused and none of its code was run: it is damaged, or holds non-tensors"
            f"{f', such as {reason[1]}' if reason else ''}"
        ) from error
    except Exception as error:  # the unpickler raises any exception for bytes that are not a pickle
        raise ValueError(f"checkpoint {path} is damaged, or not a torch file: {error}") from error
