"""Measurements of batches of pictures on the disk, so that an interrupted evaluation does no finished batch again.

    RUN/evaluation/batches/teacher-4-0123456789abcdef/
        00000000.safetensors      measurements of the batch that begins at picture 0, one row per picture

The name of a folder holds a fingerprint of everything that its numbers depend on: weights, sampling, prompts, rewards.
Another recipe or another checkpoint therefore has another folder. Files are complete or do not exist.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmdr_train.base.atomic_files import write_whole

Rows = dict[str, Tensor]
"""Measurements by name, each with a row per picture."""


class FinishedBatches:
    """The measurements in a folder.

    Args:
        depends: everything that the measurements of all sets of pictures depend on.
    """

    def __init__(self, folder: Path, depends: Any) -> None:
        self.folder, self.depends = folder, depends

    def place(self, key: str, own: Any) -> Path:
        """The folder of a set of pictures, whose numbers depend on `own`, too."""
        text = json.dumps([key, own, self.depends], sort_keys=True)
        return self.folder / f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def read(self, place: Path, index: range) -> Rows | None:
        """The measurements of the pictures with these indices; None if they are not there, or damaged."""
        try:
            rows = load_file(_file(place, index))
        except (OSError, SafetensorError):
            return None
        return rows if all(len(values) == len(index) for values in rows.values()) else None

    def write(self, place: Path, index: range, rows: Rows) -> None:
        """Write the measurements of the pictures with these indices."""
        place.mkdir(parents=True, exist_ok=True)
        rows = {name: values.contiguous().cpu() for name, values in rows.items()}
        write_whole(_file(place, index), lambda path: save_file(rows, path))


def _file(place: Path, index: range) -> Path:
    return place / f"{index.start:08d}.safetensors"
