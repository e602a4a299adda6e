"""Atomic writes: a file is complete or does not exist, even after a power failure."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


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
