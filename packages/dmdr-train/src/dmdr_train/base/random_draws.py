"""All randomness of a run: named generators, derived from the seed, the step and the sample.

Every sample of every update has a generator of its own for every purpose, so a draw depends neither on how a batch is
split over processes and micro-batches nor on earlier draws. A run therefore has no random state to save: the step is
enough to resume it exactly.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


def named_generator(seed: int, *name: str | int) -> torch.Generator:
    """Return the CPU generator of a name; the same seed and name always give the same numbers."""
    key = "/".join(str(part) for part in (seed, *name)).encode()
    state = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return torch.Generator().manual_seed(state)


def seed_others(seed: int, *name: str | int) -> None:
    """Seed the global generators of Python, NumPy and torch, which third-party code may use."""
    state = named_generator(seed, "others", *name).initial_seed()
    random.seed(state)
    np.random.seed(state % 2**32)
    torch.manual_seed(state)


@dataclass(frozen=True)
class Draws:
    """The random numbers of one micro-batch.

    Args:
        seed: the run's seed.
        update: the name of the update, such as ("fake_score", 17).
        samples: the positions of this micro-batch in the global batch.
    """

    seed: int
    update: tuple[str | int, ...]
    samples: Sequence[int]

    def each(self, purpose: str) -> list[torch.Generator]:
        """Return one generator per sample."""
        return [named_generator(self.seed, *self.update, purpose, index) for index in self.samples]

    def shared(self, purpose: str) -> torch.Generator:
        """Return one generator for the update, the same on every process."""
        return named_generator(self.seed, *self.update, purpose)
