"""A batch of pictures, on which work that several rewards need is done once."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from dmdr_rewards.pictures.images import Images, as_pictures, size
from dmdr_rewards.pictures.preprocess import Preprocess


class PictureBatch:
    """Pictures that remember the pixels and the features computed from them, for as long as the batch lives.

    Built-in rewards accept a batch in place of pictures. Rewards that resize and crop these pictures alike share the
    resized pixels, even if they normalise them differently. Rewards with the same tower and the same preprocessing
    share the features.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self._results: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, images: "Images | PictureBatch") -> "PictureBatch":
        """The batch of these pictures; `images` itself if it is one."""
        return images if isinstance(images, PictureBatch) else cls(images)

    def pixels(self, preprocess: Preprocess, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`preprocess.pixels` of these pictures."""
        pictures = self.once("pictures", lambda: as_pictures(self.images))
        sizes = [tuple(pictures.shape[-2:])] if isinstance(pictures, Tensor) else [size(each) for each in pictures]
        plans = tuple(preprocess.plan(*each) for each in sizes)
        key = (plans, preprocess.eight_bit and not isinstance(pictures, Tensor), device, dtype)
        resized = self.once(key, lambda: preprocess.resized(pictures, device, dtype))
        return self.once((key, preprocess.mean, preprocess.std), lambda: preprocess.normalised(resized))

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, which runs only the first time that this key is given."""
        if key not in self._results:
            self._results[key] = compute()
        return self._results[key]
