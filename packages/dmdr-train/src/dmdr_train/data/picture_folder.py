"""Folders of pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

from dmdr_rewards.score.sources import ENDINGS

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def pictures_in(path: Path) -> list[Path]:
    """The files of a folder that `dmdr-score` reads as pictures, sorted by name; sub-folders are not searched.

    Names that begin with a dot are left out.
    """
    return sorted(p for p in path.glob("[!.]*") if p.suffix.lower() in ENDINGS)


def class_folders(path: Path) -> list[Path]:
    """The sub-folders of a folder, one for each class, sorted by name; names that begin with a dot are left out."""
    return sorted(p for p in path.glob("[!.]*") if p.is_dir())


def read_picture(path: Path, size: tuple[int, int]) -> "Tensor":
    """A picture as `[3, H, W]` in [0, 1]. One of another size is resized to cover (H, W), and its centre is cut out.

    Raises:
        ValueError: the file cannot be read as a picture.
    """
    from dmdr_rewards.base.safe_reading import open_rgb

    try:
        picture = open_rgb(path)
    except Exception as error:  # decoders raise any exception for bytes that are not a picture
        raise ValueError(f"{path} cannot be read as a picture ({error}); remove it") from error
    return fitted(picture, size)


def fitted(picture: "Image", size: tuple[int, int]) -> "Tensor":
    """An RGB picture as `[3, H, W]` in [0, 1], resized to cover (H, W) and cut to its centre if its size is another."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    if picture.size != size[::-1]:
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)
