"""Rewards are asked for scores: what they fail with is kept, since one process alone must not leave the others."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

UNSCORED = (OSError, ValueError)
"""What a reward raises for pictures that it cannot score, an endpoint among them that does not answer."""


def asked(score: "Callable[[], Tensor]", pictures: "Tensor") -> "tuple[Tensor, str]":
    """The scores `[B]` of pictures `[B, …]`, and why there are none; empty if there are.

    They are NaN where the reward fails, or the pictures are no numbers, which is not the reward's fault.
    """
    failure = ""
    if bool(pictures.isfinite().all()):
        try:
            return score(), failure
        except UNSCORED as error:
            failure = str(error) or type(error).__name__
    return pictures.flatten(1).sum(dim=1) * float("nan"), failure
