"""Atomic writes: a file or folder is complete or does not exist, even after a power failure."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmdr_rewards.base.atomic_files import settle, settle_names, write_whole

__all__ = ["fingerprint", "settle", "settle_names", "write_folder", "write_whole"]


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
