"""Files that are whole or not there, also after a machine has lost its power."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, and rename it into place when it is done."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        settle(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Return when the operating system has put a file on its disk, so that a later name for it is never one of half.

    Raises:
        OSError: it could not.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


def settle_names(folder: Path) -> None:
    """The same for the names in a folder, where its file system knows how to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
