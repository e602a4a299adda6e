"""The names of the networks whose features can be compared. Imports no torch."""

import difflib
import os
from pathlib import Path

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.interface import registry

FIRST = ("inception", "dinov2", "clip")
"""The networks that `compare.networks` loads in a way of its own; all others are image towers of rewards."""

CLASSIFIERS = ("inception", "class-label")
"""The networks with class logits, whose inception score needs no other pictures."""


def check_features(name: str, checkpoint: str | os.PathLike[str] | None) -> None:
    """Check a network before anything is loaded.

    Raises ValueError for an unknown name and for a network without a checkpoint, and MissingError, a ValueError, for a
    checkpoint that is not there.
    """
    names = sorted({*FIRST, *registry.available()})
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown network {name!r}: did you mean {nearest!r}? Choose one of {', '.join(names)}")
    if checkpoint is None:
        raise ValueError(f"{name} comes without a checkpoint: give {name}=FILE or FOLDER")
    if not Path(checkpoint).exists():
        raise MissingError(f"checkpoint {checkpoint}: no such file or folder")
