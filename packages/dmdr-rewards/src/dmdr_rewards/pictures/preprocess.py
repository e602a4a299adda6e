"""Differentiable preprocessing: from a picture to the pixels that a network expects."""

import functools
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmdr_rewards.pictures.images import Images, Picture, as_picture, as_pictures, as_tensor, size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_PIL_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# preprocessor_config.json names filters by their numbers in PIL.
_FILTERS = {2: "bilinear", 3: "bicubic"}


class Plan(NamedTuple):
    """Resize to `size` = (height, width), then crop the result to `box` = (left, top, right, bottom).

    A box that extends beyond the picture is filled with zeros. Equal plans give equal pixels, which can be shared.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int]
    filter: str

    def on_tensor(self, images: Tensor) -> Tensor:
        """Tensor[B, 3, H, W] -> Tensor[B, 3, h, w], differentiable. A step that has no effect changes no bit."""
        if self.size != tuple(images.shape[-2:]):
            images = F.interpolate(images, size=self.size, mode=self.filter, align_corners=False, antialias=True)
        (height, width), (left, top, right, bottom) = self.size, self.box
        return F.pad(images, (-left, right - width, -top, bottom - height))

    def on_picture(self, picture: Image.Image) -> Image.Image:
        """Do the same in PIL's 8-bit arithmetic, as the networks' own preprocessing does."""
        height, width = self.size
        if self.size != (picture.height, picture.width):
            picture = picture.resize((width, height), _PIL_FILTERS[self.filter])
        return picture.crop(self.box)


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop or pad around the centre, and normalise. A step that has no effect changes no bit.

    resize  (height, width): squash to this size; an integer: resize one side to it and keep the aspect ratio; None: do
            not resize
    side    the side that an integer `resize` refers to: "shorter"; or "longer" to letterbox, which fills up to `crop`
            with zeros before normalising
    crop    (height, width) of the centre to keep; None: no crop
    mean, std  per channel: (pixel − mean) / std
    filter  "bicubic" or "bilinear", always with antialiasing
    halves  how the offset of a centre crop is rounded: "down" (transformers) or "even" (torchvision)
    eight_bit  True: PIL resizes 8-bit pictures and rounds the result to 8 bits, as most official implementations do;
            False: convert them to floats first

    torch resizes floats. Bicubic overshoot is not clamped, so every pixel keeps its gradient.
    """

    resize: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    filter: str = "bicubic"
    side: Literal["shorter", "longer"] = "shorter"
    halves: Literal["down", "even"] = "down"
    eight_bit: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """Float Tensor[B, 3, H, W] in [0, 1] -> normalised Tensor[B, 3, h, w] of the same dtype.

        Raises ValueError for a picture that is smaller than the crop.
        """
        height, width = images.shape[-2:]
        return self.normalised(self.plan(height, width).on_tensor(images))

    def picture(self, picture: Picture) -> Tensor:
        """One picture (see `dmdr_rewards.pictures.images`) -> normalised Tensor[3, h, w]: float32 from 8 bits.

        Data-loading workers call this. Raises ValueError for a picture that cannot be read or is smaller than the crop.
        """
        return self.normalised(_planned(self, as_picture(picture))[None])[0]

    def pixels(self, images: Images, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Pictures in any accepted form -> normalised `dtype` Tensor[B, 3, h, w] on `device`.

        Raises ValueError for pictures that `dmdr_rewards.pictures.images` refuses, a picture that is smaller than the
        crop, and results of several sizes.
        """
        return self.normalised(self.resized(as_pictures(images), device, dtype))

    def resized(self, pictures: "Tensor | list[Image.Image | Tensor]", device: torch.device, dtype: Any) -> Tensor:
        """The result of `as_pictures` -> `pixels` before normalising, Tensor[B, 3, h, w] in [0, 1]."""
        if isinstance(pictures, Tensor):
            height, width = pictures.shape[-2:]
            return self.plan(height, width).on_tensor(pictures.to(device, dtype))
        batch = [_planned(self, picture) for picture in pictures]
        sizes = sorted({size(picture) for picture in batch})
        if len(sizes) > 1:
            raise ValueError(f"pictures of one batch end up in several sizes, {sizes}: score each in its own call")
        return torch.stack([picture.to(device, dtype) for picture in batch])

    def normalised(self, images: Tensor) -> Tensor:
        """(images − mean) / std, per channel of Tensor[B, 3, h, w]."""
        mean, std = (_constant(values, images.dtype, images.device) for values in (self.mean, self.std))
        return (images - mean) / std

    def plan(self, height: int, width: int) -> Plan:
        """The resize and crop for a picture of this size. Raises ValueError if it is smaller than the crop."""
        rows, columns = self._scaled(height, width)
        if self.crop is None:
            return Plan((rows, columns), (0, 0, columns, rows), self.filter)
        bottom, right = self.crop
        if self.side == "shorter" and (bottom > rows or right > columns):
            raise ValueError(f"pictures of {rows}x{columns} are smaller than the crop of {bottom}x{right}: resize them")
        left, top = self._half(columns - right), self._half(rows - bottom)
        return Plan((rows, columns), (left, top, left + right, top + bottom), self.filter)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the result; None if it depends on the picture."""
        return self.crop or (None if isinstance(self.resize, int) else self.resize)

    def __str__(self) -> str:
        steps = []
        if isinstance(self.resize, int):
            steps.append(f"{self.side} side to {self.resize}, {self.filter}, antialias")
        elif self.resize is not None:
            steps.append(f"squash to {self.resize[0]}x{self.resize[1]}, {self.filter}, antialias")
        if self.crop is not None:
            what = "zero pad" if self.side == "longer" else "centre crop"
            steps.append(f"{what} {'to ' if self.side == 'longer' else ''}{self.crop[0]}x{self.crop[1]}")
        if not self.eight_bit:
            steps.append("8 bits become floats first")
        return "; ".join([*steps, f"mean {self.mean}, std {self.std}"])

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if not isinstance(self.resize, int):
            return self.resize
        if self.side == "longer":
            scale = self.resize / max(height, width)
            return max(round(height * scale), 1), max(round(width * scale), 1)
        short = min(height, width)
        return self.resize * height // short, self.resize * width // short

    def _half(self, pixels: int) -> int:
        return round(pixels / 2) if self.halves == "even" else int(pixels / 2)


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number per channel, Tensor[1, 3, 1, 1], copied to the device once, since the CPU waits for the copy."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device).view(1, 3, 1, 1)


def chosen(preprocess: str, reference: Preprocess) -> Preprocess:
    """The preprocessing for the reward option `preprocess`: `reference`, or "dmdr", a squash to the same size.

    Both agree for square pictures only. DMDR's authors squash for every reward. Raises ValueError for another option.
    """
    if preprocess == "reference":
        return reference
    if preprocess != "dmdr":
        raise ValueError(f"preprocess {preprocess!r}: choose 'reference' or 'dmdr'")
    return replace(reference, resize=reference.image_size, crop=None, side="shorter", halves="down")


def _planned(preprocess: Preprocess, picture: "Image.Image | Tensor") -> Tensor:
    plan = preprocess.plan(*size(picture))
    if preprocess.eight_bit and not isinstance(picture, Tensor):
        return as_tensor(plan.on_picture(picture))
    return plan.on_tensor(as_tensor(picture)[None])[0]


def from_folder(folder: Path) -> Preprocess:
    """The preprocessing defined by a folder's preprocessor_config.json, in the format of transformers.

    Without this file pictures stay in [0, 1] and are not resized, with a warning: a classifier that expects normalised
    pixels would give wrong scores.

    Raises ValueError for a file with steps that are not supported.
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
    # The rule of ConvNeXt and ResNet: below 384, crop the centre of a larger picture; otherwise squash.
    return (int(side / share), (side, side)) if side < 384 else ((side, side), None)


def _size(size: Any) -> tuple[int, int] | int:
    if isinstance(size, int):
        return (size, size)
    if "shortest_edge" in size and len(size) == 1:
        return int(size["shortest_edge"])
    return (int(size["height"]), int(size["width"]))
