"""From a picture to the pixels that a network was trained on, differentiably."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# PIL's numbers for its filters, which is how preprocessor_config.json names them.
_FILTERS = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop the centre, normalise. A step that has nothing to do leaves the picture bit for bit as it was.

    resize  (height, width): squash to exactly that; an integer: bring the shorter side to it and keep the aspect
            ratio; None: leave
    crop    (height, width) of the centre to keep; None: all
    mean, std  per channel: (pixel − mean) / std
    filter  "bicubic" or "bilinear", always with antialiasing. Bicubic overshoot is not clamped, so that every pixel
            keeps its gradient; libraries that resize 8-bit pictures clip there.
    """

    resize: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    filter: str = "bicubic"

    def __call__(self, images: Tensor) -> Tensor:
        """Tensor[B, 3, H, W] in [0, 1] -> normalised Tensor[B, 3, h, w] of the same dtype.

        Raises ValueError for a picture that is smaller than the crop.
        """
        images = self._resized(images)
        if self.crop is not None:
            images = centre_crop(images, self.crop)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the result where it does not depend on the picture."""
        return self.crop or (None if isinstance(self.resize, int) else self.resize)

    def __str__(self) -> str:
        steps = []
        if isinstance(self.resize, int):
            steps.append(f"shorter side to {self.resize}, {self.filter}, antialias")
        elif self.resize is not None:
            steps.append(f"squash to {self.resize[0]}x{self.resize[1]}, {self.filter}, antialias")
        if self.crop is not None:
            steps.append(f"centre crop {self.crop[0]}x{self.crop[1]}")
        return "; ".join([*steps, f"mean {self.mean}, std {self.std}"])

    def _resized(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.resize is None:
            return images
        if isinstance(self.resize, int):
            short = min(height, width)
            size = (self.resize * height // short, self.resize * width // short)
        else:
            size = self.resize
        if size == (height, width):
            return images
        return F.interpolate(images, size=size, mode=self.filter, align_corners=False, antialias=True)


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Tensor[..., H, W] -> its centre, Tensor[..., *size]. Raises ValueError if `size` is larger than the picture."""
    (height, width), (rows, columns) = images.shape[-2:], size
    if rows > height or columns > width:
        raise ValueError(f"pictures of {height}x{width} are smaller than the crop of {rows}x{columns}: resize them")
    top, left = (height - rows) // 2, (width - columns) // 2
    return images[..., top : top + rows, left : left + columns]


def from_folder(folder: Path) -> Preprocess:
    """What the folder's preprocessor_config.json (transformers) says.

    Without that file pictures go in as they are, [0, 1] and unscaled, with a warning: a classifier that expects
    normalised pixels would score them without complaint, and wrongly.

    Raises ValueError for a file that asks for something not done here.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        warnings.warn(f"{path} is missing: pictures enter this classifier in [0, 1], as they are", stacklevel=2)
        return Preprocess()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return _from_config(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _from_config(config: dict[str, Any]) -> Preprocess:
    if not config.get("do_rescale", True) or abs(config.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise ValueError("do_rescale and rescale_factor: only pixels rescaled by 1/255 are supported")
    number = config.get("resample", 3)
    if number not in _FILTERS:
        raise ValueError(f"resample {number} is not supported: use 2 (bilinear) or 3 (bicubic)")
    resize, crop = _geometry(config)
    normalise = config.get("do_normalize", True)
    return Preprocess(
        resize=resize,
        crop=crop,
        mean=tuple(config["image_mean"]) if normalise else Preprocess.mean,
        std=tuple(config["image_std"]) if normalise else Preprocess.std,
        filter=_FILTERS[number],
    )


def _geometry(config: dict[str, Any]) -> tuple[tuple[int, int] | int | None, tuple[int, int] | None]:
    resize = _size(config["size"]) if config.get("do_resize", True) and "size" in config else None
    if resize is not None and config.get("crop_pct") is not None:
        return _cropped_share(resize if isinstance(resize, int) else resize[0], config["crop_pct"])
    if not config.get("do_center_crop", False):
        return resize, None
    crop = _size(config["crop_size"])
    return resize, (crop, crop) if isinstance(crop, int) else crop


def _cropped_share(side: int, share: float) -> tuple[tuple[int, int] | int, tuple[int, int] | None]:
    # ConvNeXt's and ResNet's rule: below 384 keep the centre of a larger picture, from there on squash.
    return (int(side / share), (side, side)) if side < 384 else ((side, side), None)


def _size(size: Any) -> tuple[int, int] | int:
    if isinstance(size, int):
        return (size, size)
    if "shortest_edge" in size and len(size) == 1:
        return int(size["shortest_edge"])
    return (int(size["height"]), int(size["width"]))
