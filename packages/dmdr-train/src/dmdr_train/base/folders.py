"""Folders that a program will write to, and that need not exist yet."""

import tempfile
from pathlib import Path

from dmdr_train.base.errors import UserError


def nearest(path: Path) -> Path:
    """The path, or the first above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_writable(key: str, path: Path) -> None:
    """A folder can be made there, or written to."""
    existing = nearest(path)
    if not existing.is_dir():
        raise UserError(key, f"{existing} is a file; give a folder")
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # asks the file system, which permissions do not tell all
    except OSError as error:
        raise UserError(key, f"{existing} cannot be written to ({error.strerror}); give another folder") from None
