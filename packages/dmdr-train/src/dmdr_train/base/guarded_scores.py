"""Rewards are asked for scores: what they fail with is kept, since one process alone must not leave the others."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

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


class Scored(NamedTuple):
    """What a reward says of pictures.

    Attributes:
        score: `[B]`; NaN where there is none.
        kept: `[B]`, false where the reward has left a picture without a score, which is no failure.
        failure: why there are no scores at all; empty if there are.
    """

    score: "Tensor"
    kept: "Tensor"
    failure: str


def scored(reward: Any, score: "Callable[[], Tensor]", pictures: "Tensor") -> Scored:
    """The scores of pictures `[B, …]`, as `asked` returns them, and which of them the reward has left out.

    A reward may leave pictures without a score; it counts them in its attribute `skipped`. From these no gradient flows
    back to `pictures`, whose tensor no other reward may be given.
    """
    import torch

    before = getattr(reward, "skipped", 0)
    found, failure = asked(score, pictures)
    left_out = getattr(reward, "skipped", 0) > before
    kept = ~found.isnan() if left_out else torch.ones_like(found, dtype=torch.bool)
    if left_out and pictures.requires_grad:  # 0 times the slope of a missing score may be NaN
        pictures.register_hook(lambda slope: slope.masked_fill(~kept.reshape(-1, *[1] * (slope.ndim - 1)), 0.0))
    return Scored(found, kept, failure)
