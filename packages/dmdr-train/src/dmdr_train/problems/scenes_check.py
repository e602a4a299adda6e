"""The exact check of the scenes as a reward, which has no gradient."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dmdr_rewards import RewardInfo

if TYPE_CHECKING:
    from torch import Tensor


class ScenesCheck:
    """1 where a picture shows what its caption says, otherwise 0; see `check`. `dtype` has no effect."""

    info = RewardInfo(
        name="scenes-check",
        description="1 where a picture of the built-in text-to-image problem shows what its caption says, otherwise 0",
        range=(0.0, 1.0),
        licence="none needed",
        source="dmdr_train/problems/scenes/check.py",
        prompt="text",
        differentiable=False,
        image_size=(32, 32),
        preprocess="none",
    )

    def __init__(self, device: Any = "cpu", dtype: Any = None):
        self.device = device

    def score(self, images: "Tensor", prompts: Sequence[Any]) -> "Tensor":
        """Score pictures `[B, 3, 32, 32]` in [0, 1] under their captions -> float32 `[B]`.

        Raises:
            ValueError: the counts differ, or a caption is not one of the problem's.
        """
        from dmdr_train.problems.scenes import check

        return check(images, prompts).float().to(self.device)
