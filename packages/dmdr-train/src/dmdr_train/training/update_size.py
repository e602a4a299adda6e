"""The size of an update's pictures, where a recipe gives several sizes."""

from collections.abc import Sequence
from itertools import accumulate

import torch

from dmdr_train.base.random_draws import Draws
from dmdr_train.recipe.picture_sizes import Size


def update_size(sizes: Sequence[Size], draws: Draws) -> tuple[int, int]:
    """(height, width) in pixels, drawn by the sizes' shares, the same in all micro-batches and on all processes.

    A single size needs no draw.
    """
    if len(sizes) == 1:
        return sizes[0].shape
    place = torch.rand((), generator=draws.shared("size"), dtype=torch.float64).item()
    reached = accumulate(size.share for size in sizes)
    return next((size for size, end in zip(sizes, reached, strict=True) if place < end), sizes[-1]).shape
