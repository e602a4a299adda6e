"""Atomic writes: a file or folder is complete or does not exist, even after a power failure."""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, then rename the written file to `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        settle(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Wait until the operating system has put a file on its disk, so that a later rename never exposes a partial file.

    Raises:
        OSError: the file could not be written to the disk.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def settle_names(folder: Path) -> None:
    """Do the same for the names in a folder, if its file system supports that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fingerprint(path: Path) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a new temporary folder beside `path`, then put this folder in the place of `path`."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        for made in (partial, *partial.rglob("*")):
            settle_names(made) if made.is_dir() else settle(made)
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
