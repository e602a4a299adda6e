"""Pictures, as every reward takes them.

- float Tensor[B, 3, H, W] with values in [0, 1], on any device: its gradient is kept;
- uint8 Tensor[B, 3, H, W] or uint8 numpy array [B, H, W, 3], values 0 to 255: no gradient;
- a list of B paths, PIL pictures or uint8 arrays [H, W, 3], all of one size: no gradient. Files and PIL pictures are
  converted to RGB, which drops an alpha channel.

Decoders overshoot [0, 1]: clamp their output before scoring it. Values outside by more than `TOLERANCE` are an error,
because a picture in [-1, 1] or [0, 255] scored by mistake gives a number that looks plausible and is not.
"""

from collections.abc import Sequence
from os import PathLike, fspath
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

TOLERANCE = 1e-3
"""How far outside [0, 1] a value may lie: room for rounding, not for overshoot."""

Picture: TypeAlias = "str | PathLike[str] | Image.Image | np.ndarray"
Images: TypeAlias = "Tensor | np.ndarray | Sequence[Picture]"


def as_images(images: Images, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Any of the accepted forms (top of this module) -> `dtype` Tensor[B, 3, H, W] in [0, 1] on `device`.

    Raises ValueError for an empty batch, a wrong rank or channel count, a value that is not in [0, 1] or not finite,
    a type or dtype not listed above, pictures of several sizes, and a file that is not a picture.
    """
    pictures = _as_tensor(images).to(device)
    if pictures.dtype == torch.uint8:
        return pictures.to(dtype) / 255
    _check_range(pictures)
    return pictures.to(dtype)


def _as_tensor(images: Images) -> Tensor:
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images have dtype {images.dtype}: give floats in [0, 1], or uint8 in 0 to 255")
        return _checked_shape(images, "[B, 3, H, W]", channels=1)
    if isinstance(images, np.ndarray):
        return _checked_shape(_from_array(images), "[B, H, W, 3]", channels=3).permute(0, 3, 1, 2)
    if isinstance(images, (str, PathLike, Image.Image)) or not isinstance(images, Sequence):
        raise ValueError(f"images is one {type(images).__name__}: give a list of pictures, or a Tensor[B, 3, H, W]")
    if not images:
        raise ValueError("images is an empty batch: give at least one picture")
    pictures = [_from_array(_read(picture)) for picture in images]
    sizes = sorted({tuple(picture.shape) for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(f"pictures of one batch differ in shape, {sizes}: score each size in its own call")
    return _checked_shape(torch.stack(pictures), "[B, H, W, 3]", channels=3).permute(0, 3, 1, 2)


def _checked_shape(images: Tensor, layout: str, channels: int) -> Tensor:
    shape = tuple(images.shape)
    if images.ndim != 4:
        raise ValueError(f"images have shape {shape}, rank {images.ndim}: give {layout}, also for a single picture")
    if shape[channels] != 3:
        raise ValueError(f"images have shape {shape}, with {shape[channels]} channels: give 3 (RGB) as {layout}")
    if images.numel() == 0:
        raise ValueError(f"images is an empty batch, shape {shape}: give at least one picture of at least one pixel")
    return images


def _check_range(images: Tensor) -> None:
    # One read-back from the device answers every question: aminmax lets NaN and infinity through.
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        if low != low:
            raise ValueError("images hold NaN: look at the decoder, or at a loss that blew up, before scoring them")
        raise ValueError(
            f"image values span [{low:.4g}, {high:.4g}], outside [0, 1]: clamp a decoder's overshoot with "
            ".clamp(0, 1); map [-1, 1] with (x + 1) / 2; divide 0 to 255 by 255"
        )


def _from_array(array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"array of dtype {array.dtype}: give uint8 in 0 to 255, or a float torch tensor in [0, 1]")
    return torch.tensor(array)


def _read(picture: Picture) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    if isinstance(picture, Image.Image):
        return np.asarray(picture.convert("RGB"))
    if not isinstance(picture, (str, PathLike)):
        raise ValueError(f"a picture is a {type(picture).__name__}: give paths, PIL pictures or uint8 arrays [H, W, 3]")
    try:
        with Image.open(picture) as file:
            return np.asarray(file.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"picture {fspath(picture)} cannot be read: {error}") from error
