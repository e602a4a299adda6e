"""The pixels of Qwen-VL models: each picture keeps its shape, and becomes a row of patches."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.pictures.images import Images, as_pictures
from dmdr_rewards.pictures.preprocess import CLIP_MEAN, CLIP_STD, Preprocess

_LONGEST = 200  # times the shorter side: the limit of Qwen-VL's own preprocessing


@dataclass(frozen=True)
class Patches(Preprocess):
    """Resize to about the same area and shape, normalise, and cut into patches. Differentiable.

    The sides become multiples of `patch * merge`, the area lies between `smallest` and `largest` pixels, and the aspect
    ratio changes as little as that allows. `merge * merge` patches become one token of the language model. A picture is
    repeated `frames` times, because the network reads videos.

    Equals transformers' Qwen2VLImageProcessor: its PIL version for 8-bit pictures, its torchvision version for floats.
    """

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    smallest: int = 56 * 56
    largest: int = 28 * 28 * 1280
    patch: int = 14
    merge: int = 2
    frames: int = 2

    def packed(self, images: Images, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """B pictures (see `dmdr_rewards.pictures.images`), which may differ in size -> their patches and their grids.

        The patches are a `dtype` Tensor[Σ h·w, 3 · frames · patch²]; the grids, on the same device, an integer
        Tensor[B, 3] of (1, h, w). Raises ValueError for pictures that cannot be read, or that are more than 200 times
        as long as wide.
        """
        pictures = as_pictures(images)
        if isinstance(pictures, Tensor):
            pixels = list(self(pictures.to(device, dtype)))
        else:
            pixels = [self.picture(each).to(device, dtype) for each in pictures]
        grids = [[1, each.shape[-2] // self.patch, each.shape[-1] // self.patch] for each in pixels]
        return torch.cat([self._cut(each) for each in pixels]), torch.tensor(grids, device=device)

    def __str__(self) -> str:
        return (
            f"aspect ratio kept, sides multiples of {self.patch * self.merge}, {self.smallest} to {self.largest} pixels"
            f", {self.filter}, antialias; mean {self.mean}, std {self.std}"
        )

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if max(height, width) > _LONGEST * min(height, width):
            raise ValueError(f"a picture of {height}x{width} is more than {_LONGEST} times as long as wide: crop it")
        unit = self.patch * self.merge
        sides = [round(side / unit) * unit for side in (height, width)]
        if math.prod(sides) > self.largest:
            shrink = math.sqrt(height * width / self.largest)
            sides = [max(math.floor(side / shrink / unit), 1) * unit for side in (height, width)]
        elif math.prod(sides) < self.smallest:
            grow = math.sqrt(self.smallest / (height * width))
            sides = [math.ceil(side * grow / unit) * unit for side in (height, width)]
        return sides[0], sides[1]

    def _cut(self, pixels: Tensor) -> Tensor:
        """Tensor[3, H, W] -> Tensor[h·w, 3 · frames · patch²]; the patches of one token lie side by side."""
        _, height, width = pixels.shape
        unit = self.patch * self.merge
        cells = pixels.view(3, height // unit, self.merge, self.patch, width // unit, self.merge, self.patch)
        rows = cells.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        return rows.expand(*rows.shape[:5], self.frames, -1, -1).flatten(0, 3).flatten(1)


def from_folder(folder: Path) -> Patches:
    """The preprocessing in a folder's preprocessor_config.json. Raises ValueError for another family's, or none."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise MissingError(f"checkpoint {folder} must be a folder with preprocessor_config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not str(config.get("image_processor_type", "")).startswith(("Qwen2VL", "Qwen3VL")):
            raise ValueError(
                f"image_processor_type {config.get('image_processor_type')!r} is not of the family Qwen-VL"
            )
        size: Any = config.get("size") or {}
        smallest, largest = (
            int(config.get(old) or size.get(new) or size.get(old))
            for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
        )
        return Patches(
            mean=tuple(config.get("image_mean", CLIP_MEAN)),
            std=tuple(config.get("image_std", CLIP_STD)),
            smallest=smallest,
            largest=largest,
            patch=int(config.get("patch_size", Patches.patch)),
            merge=int(config.get("merge_size", Patches.merge)),
            frames=int(config.get("temporal_patch_size", Patches.frames)),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
