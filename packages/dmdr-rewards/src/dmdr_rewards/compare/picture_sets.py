"""The two sets of pictures that are compared. Imports no torch."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmdr_rewards.base.errors import UserError
from dmdr_rewards.score.sources import Item, find

NEIGHBOURS = {"precision and recall": 3, "density and coverage": 5}
"""The nearest neighbours that these measures look for."""
LEAST = 2 * (max(NEIGHBOURS.values()) + 1)
"""The fewest pictures of a set: each half of it has more than these neighbours."""


def find_set(name: str, images: str, column: str | None) -> list[Item]:
    """The pictures of the set A or B, each once, however many prompts it has.

    images, column  as in `score.sources.find`

    Raises UserError that names the set for fewer than `LEAST` pictures.
    """
    with _instead_of_images(name):
        found = list({item.source: item for item in find(images, column)}.values())
    if len(found) < LEAST:
        raise UserError(name, f"{images} holds {len(found)} pictures: give at least {LEAST}, and better thousands")
    return found


def warn_of_overlap(a: Sequence[Item], b: Sequence[Item]) -> None:
    """Warn if both sets hold the same files, whatever links lead there."""
    shared = {_real(item) for item in a} & {_real(item) for item in b}
    if shared:
        warnings.warn(
            f"A and B share {len(shared)} pictures: the sets are not independent, and seem closer than they are",
            stacklevel=3,
        )


def _real(item: Item) -> Any:
    return os.path.realpath(item.source) if isinstance(item.source, Path) else item.source


@contextmanager
def _instead_of_images(name: str) -> Iterator[None]:
    """`find` names the argument of scoring in its errors."""
    try:
        yield
    except UserError as error:
        raise UserError(name, str(error).removeprefix("IMAGES: ")) from error
