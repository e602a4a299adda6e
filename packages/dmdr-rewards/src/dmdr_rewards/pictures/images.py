"""The forms of pictures that every reward accepts.

- float Tensor[B, 3, H, W] with values in [0, 1], on any device: it keeps its gradient;
- uint8 Tensor[B, 3, H, W] or uint8 numpy array [B, H, W, 3], values 0 to 255: no gradient;
- a list of B paths, PIL pictures or uint8 arrays [H, W, 3] (no gradient), or float Tensors[3, H, W] (with gradient).
  Files and PIL pictures are converted to upright RGB with 8 bits: an alpha channel is dropped, 16 bits of grey are
  rounded, and the EXIF orientation is applied. A list may mix sizes if the reward resizes all pictures to one size.

Decoders overshoot [0, 1]: clamp their output before scoring it. Values outside by more than `TOLERANCE` are an error,
because a picture in [-1, 1] or [0, 255] would get a score that looks plausible but is wrong. Pictures that are trained
on, tensors on an accelerator that require a gradient, are not read, since the CPU would wait for them: their score is
NaN instead of an error.
"""

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dmdr_rewards.base.safe_reading import as_rgb, open_rgb

TOLERANCE = 1e-3
"""How far outside [0, 1] a value may lie. It allows for rounding, not for overshoot."""

Picture: TypeAlias = "str | PathLike[str] | Image.Image | np.ndarray | Tensor"
Images: TypeAlias = "Tensor | np.ndarray | Sequence[Picture]"


def as_images(images: Images, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Pictures in an accepted form (see the module) -> `dtype` Tensor[B, 3, H, W] in [0, 1] on `device`.

    Raises ValueError for an empty batch, a wrong rank or channel count, values that are not finite or not in
    [0, 1], other types and dtypes, pictures of several sizes, a file that is not a picture, and PIL pictures of 32-bit
    integers or floats.
    """
    pictures = as_pictures(images)
    if isinstance(pictures, Tensor):
        return pictures.to(device, dtype)
    sizes = sorted({size(picture) for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(f"pictures of one batch differ in size, {sizes}: score each size in its own call")
    return torch.stack([as_tensor(picture) for picture in pictures]).to(device, dtype)


def as_pictures(images: Images) -> "Tensor | list[Image.Image | Tensor]":
    """Pictures in an accepted form -> checked float Tensor[B, 3, H, W], or a list of results of `as_picture`.

    Raises ValueError as `as_images` does, but accepts pictures of several sizes.
    """
    if isinstance(images, Tensor):
        _check_dtype(images)
        _check_shape(images, "[B, 3, H, W]", rank=4, channels=1)
        if images.dtype != torch.uint8:
            return _in_range(images)
        return _eight_bit(images.permute(0, 2, 3, 1).cpu().numpy())
    if isinstance(images, np.ndarray):
        _check_array(images)
        _check_shape(images, "[B, H, W, 3]", rank=4, channels=3)
        return _eight_bit(images)
    if isinstance(images, (str, PathLike, Image.Image)) or not isinstance(images, Sequence):
        raise ValueError(f"images is one {type(images).__name__}: give a list of pictures, or a Tensor[B, 3, H, W]")
    if not images:
        raise ValueError("images is an empty batch: give at least one picture")
    return [as_picture(picture) for picture in images]


def as_picture(picture: Picture) -> "Image.Image | Tensor":
    """One picture -> RGB PIL picture, or checked float Tensor[3, H, W]. Raises ValueError as `as_images` does."""
    if isinstance(picture, Tensor):
        _check_dtype(picture)
        _check_shape(picture, "[3, H, W]", rank=3, channels=0)
        if picture.dtype != torch.uint8:
            return _in_range(picture)
        return Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
    if isinstance(picture, np.ndarray):
        _check_array(picture)
        _check_shape(picture, "[H, W, 3]", rank=3, channels=2)
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return as_rgb(picture)
    if not isinstance(picture, (str, PathLike)):
        raise ValueError(f"a picture is a {type(picture).__name__}: give paths, PIL pictures or uint8 arrays [H, W, 3]")
    try:
        return open_rgb(picture)
    except Exception as error:  # decoders raise any exception for bytes that are not a picture
        raise ValueError(f"picture {fspath(picture)} cannot be read: {error}") from error


def as_tensor(picture: "Image.Image | Tensor") -> Tensor:
    """A result of `as_picture` -> float Tensor[3, H, W] in [0, 1]; float32 from 8 bits."""
    if isinstance(picture, Tensor):
        return picture
    return torch.tensor(np.asarray(picture)).permute(2, 0, 1).float() / 255


def size(picture: "Image.Image | Tensor") -> tuple[int, int]:
    """(height, width)."""
    if isinstance(picture, Tensor):
        return picture.shape[-2], picture.shape[-1]
    return picture.height, picture.width


def _eight_bit(arrays: np.ndarray) -> "list[Image.Image | Tensor]":
    return [Image.fromarray(array) for array in arrays]


def _check_dtype(images: Tensor) -> None:
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}: give floats in [0, 1], or uint8 in 0 to 255")


def _check_array(array: np.ndarray) -> None:
    if array.dtype != np.uint8:
        raise ValueError(f"array of dtype {array.dtype}: give uint8 in 0 to 255, or a float torch tensor in [0, 1]")


def _check_shape(images: "Tensor | np.ndarray", layout: str, rank: int, channels: int) -> None:
    shape = tuple(images.shape)
    if len(shape) != rank:
        raise ValueError(f"images have shape {shape}, rank {len(shape)}: give {layout}, also for a single picture")
    if shape[channels] != 3:
        raise ValueError(f"images have shape {shape}, with {shape[channels]} channels: give 3 (RGB) as {layout}")
    if 0 in shape:
        raise ValueError(f"images is an empty batch, shape {shape}: give at least one picture of at least one pixel")


def _in_range(images: Tensor) -> Tensor:
    # A single copy from the device is enough for all checks: aminmax propagates NaN and infinity.
    extremes = torch.stack(torch.aminmax(images.detach()))
    if images.requires_grad and images.device.type != "cpu":
        allowed = (extremes[0] >= -TOLERANCE) & (extremes[1] <= 1 + TOLERANCE)
        return images * torch.where(allowed, 1.0, torch.nan).to(images.dtype)
    low, high = extremes.tolist()
    if low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return images
    if low != low:
        raise ValueError("images hold NaN: check the decoder, or a loss that diverged, before scoring them")
    raise ValueError(
        f"image values span [{low:.4g}, {high:.4g}], outside [0, 1]: clamp a decoder's overshoot with "
        ".clamp(0, 1); map [-1, 1] with (x + 1) / 2; divide 0 to 255 by 255"
    )
