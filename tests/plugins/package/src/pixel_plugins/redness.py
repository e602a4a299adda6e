"""A reward without weights: how much redder than green and blue a picture is."""

from collections.abc import Sequence
from typing import Any

from dmdr_rewards import RewardInfo
from torch import Tensor


class Redness:
    info = RewardInfo(
        name="redness",
        description="mean of red − (green + blue) / 2 over the pixels",
        range=(-1.0, 1.0),
        licence="none needed",
        source="docs/extending.md",
        prompt="none",
        differentiable=True,
        image_size=None,
        preprocess="none",
    )

    def __init__(self, device: Any, dtype: Any, gain: float = 1.0):
        self.gain = gain

    def score(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        red, green, blue = images.float().unbind(dim=1)
        return self.gain * (red - (green + blue) / 2).flatten(1).mean(dim=1)
