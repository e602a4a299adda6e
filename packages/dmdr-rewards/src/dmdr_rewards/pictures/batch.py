"""Work on a batch of pictures that several rewards have in common, done once."""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmdr_rewards.pictures.images import Images, as_pictures, size

if TYPE_CHECKING:
    from dmdr_rewards.interface.reward import TowerReward
    from dmdr_rewards.pictures.preprocess import Preprocess


class Shared:
    """A batch of pictures that remembers its resized pixels and its features, for as long as it lives.

    Built-in rewards take it in place of pictures. Resized pixels are shared by rewards that resize and crop these
    pictures alike, even if they normalise them differently; features by rewards with the same tower and preprocessing.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self._done: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, images: "Images | Shared") -> "Shared":
        """`images` itself, if it is one."""
        return images if isinstance(images, Shared) else cls(images)

    def pixels(self, preprocess: "Preprocess", device: torch.device, dtype: torch.dtype) -> Tensor:
        """`preprocess.pixels` of these pictures."""
        pictures = self._once("pictures", lambda: as_pictures(self.images))
        sizes = [tuple(pictures.shape[-2:])] if isinstance(pictures, Tensor) else [size(each) for each in pictures]
        plans = tuple(preprocess.plan(*each) for each in sizes)
        key = (plans, preprocess.eight_bit and not isinstance(pictures, Tensor), device, dtype)
        resized = self._once(key, lambda: preprocess.resized(pictures, device, dtype))
        return self._once((key, preprocess.mean, preprocess.std), lambda: preprocess.normalised(resized))

    def features(self, reward: "TowerReward") -> Tensor:
        """`reward.features` of these pictures."""
        return self._once((reward.tower, reward.preprocess), lambda: reward.features(reward.pixels(self)))

    def _once(self, key: Hashable, work: Callable[[], Any]) -> Any:
        if key not in self._done:
            self._done[key] = work()
        return self._done[key]
