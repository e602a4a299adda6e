"""Checks of output folders, which may not exist yet."""

import tempfile
from pathlib import Path

from dmdr_train.base.errors import UserError


def nearest(path: Path) -> Path:
    """Return the path if it exists, otherwise its nearest parent that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_writable(key: str, path: Path) -> None:
    """Check that the folder can be made, or can be written to if it exists.

    Raises:
        UserError: it cannot.
    """
    existing = nearest(path)
    if not existing.is_dir():
        raise UserError(key, f"{existing} is a file; give a folder")
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # tries it: permissions do not tell everything
    except OSError as error:
        raise UserError(key, f"{existing} cannot be written to ({error.strerror}); give another folder") from None
