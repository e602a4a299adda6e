"""CLIP scores: how well a picture fits its prompt, as the cosine of their embeddings.

    score = scale · cos(image tower(pixels), text tower(tokens))        scale is 1, except for PickScore

Sources: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020; open_clip,
https://github.com/mlfoundations/open_clip; "Data Filtering Networks", arXiv 2309.17425, for DFN.

Scores equal those of open_clip up to rounding, for 8-bit pictures with its own preprocessing.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.interface.info import BUILT_IN, RewardInfo
from dmdr_rewards.interface.reward import TowerReward
from dmdr_rewards.networks.clip_towers import Towers, open_clip_config, open_clip_towers
from dmdr_rewards.pictures.batch import PictureBatch
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.pictures.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, chosen
from dmdr_rewards.prompts.texts import as_texts, cut


class ClipReward(TowerReward):
    """scale · cosine of the embeddings of a picture and its prompt, in [−scale, scale], which is `info.range`."""

    def __init__(self, towers: Towers, preprocess: Preprocess, info: RewardInfo, scale: float = 1.0) -> None:
        self.towers, self.tower, self.preprocess = towers, towers.image, preprocess
        self.scale = scale
        self.info = replace(
            info,
            range=(-scale, scale),
            image_size=preprocess.image_size,
            preprocess=f"{preprocess}; {towers.activation}",
        )

    def notes(self, prompts: Sequence[Any]) -> list[str | None]:
        """For each text, what the score does not read of it, or None."""
        return cut(self.towers.tokens(as_texts(prompts)), self.towers.context)

    def encode_image(self, images: "Images | PictureBatch") -> Tensor:
        """B pictures -> their embeddings of unit length, Tensor[B, D] with gradient."""
        return F.normalize(self.features_of(images), dim=-1)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """B texts -> their embeddings of unit length, Tensor[B, D] without gradient."""
        return self.towers.texts(as_texts(prompts))

    def score_features(self, features: Tensor, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B features, Tensor[B, D], under B texts -> float32 Tensor[B].

        Raises ValueError for prompts that are not texts, and for a number of prompts other than B.
        """
        texts = self.towers.texts(as_texts(prompts, len(features)))
        return (self.scale * (F.normalize(features, dim=-1) * texts).sum(dim=-1)).float()


def shorter_side(
    size: tuple[int, int], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Preprocess:
    """CLIP's own preprocessing: shorter side to `size` (bicubic), then a centre crop. For a square `size`."""
    return Preprocess(resize=min(size), crop=size, mean=tuple(mean), std=tuple(std), halves="even")


def clip(
    checkpoint: str | PathLike[str],
    model: str | PathLike[str] | None = None,
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipReward:
    """The reward `clip`: any open_clip model that uses open_clip's own tokenizer.

    checkpoint  file in open_clip's format, with `model`; or a folder that open_clip saved for the hub
    model       an architecture's name in open_clip, such as "ViT-B-32", or the path of a JSON file that defines one.
                "ViT-B-32" uses GELU and "ViT-B-32-quickgelu" QuickGELU, as OpenAI's weights need it; `info.preprocess`
                says which, and a warning names the published weights that need the other
    preprocess  "reference": as in the folder's open_clip_config.json, otherwise shorter side and centre crop;
                "dmdr": squash
    gradient_checkpointing  recompute the image tower's layers in the backward pass to save memory; changes no value

    Raises ValueError for a missing model name, and for files that are missing, damaged, unsafe or of another model.
    """
    path, steps = Path(checkpoint), {}
    if not path.exists():
        raise MissingError(f"checkpoint {path}: no such file or folder")
    if path.is_dir() and model is None:
        model = path / "open_clip_config.json"
        steps = _steps(model)
    if model is None:
        raise ValueError(f"checkpoint {path}: give the name of its architecture too, such as model='ViT-B-32'")
    config = open_clip_config(_name(model))
    _warn_of_activation(model, config)
    towers = open_clip_towers(path, config, device, dtype, gradient_checkpointing)
    return ClipReward(towers, chosen(preprocess, _from_steps(steps, towers.image_size)), BUILT_IN["clip"])


def dfn_clip(
    checkpoint: str | PathLike[str],
    model: str | PathLike[str] = "ViT-H-14",
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipReward:
    """The reward `dfn-clip`: apple/DFN5B-CLIP-ViT-H-14.

    checkpoint  open_clip_pytorch_model.bin, or the folder that holds it
    model       the architecture, as in the reward `clip`; `preprocess` sets its activation
    preprocess  "reference": QuickGELU, as in the training of the weights; "dmdr": plain GELU, as DMDR's authors load
                them. Both squash pictures; their scores differ for every picture
    gradient_checkpointing  recompute the image tower's layers in the backward pass to save memory; changes no value

    Raises ValueError for files that are missing, damaged, unsafe or of another model.
    """
    config = {**open_clip_config(_name(model)), "quick_gelu": preprocess == "reference"}
    towers = open_clip_towers(Path(checkpoint), config, device, dtype, gradient_checkpointing)
    squash = Preprocess(resize=towers.image_size, mean=CLIP_MEAN, std=CLIP_STD)
    return ClipReward(towers, chosen(preprocess, squash), BUILT_IN["dfn-clip"])


def _warn_of_activation(model: str | PathLike[str], config: dict[str, Any]) -> None:
    """Warn if a name stands for GELU and some of its published weights need QuickGELU: nothing in a file says which."""
    import open_clip

    if config.get("quick_gelu") or f"{model}-quickgelu" not in open_clip.list_models():
        return
    tags = [tag for tag in open_clip.list_pretrained_tags_by_model(str(model)) if _is_quick(str(model), tag)]
    warnings.warn(
        f"model {model} uses GELU, as in open_clip without a tag; weights of QuickGELU need model={model}-quickgelu: "
        f"{', '.join(tags) or 'those of some releases'}",
        stacklevel=3,
    )


def _is_quick(model: str, tag: str) -> bool:
    import open_clip

    return bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"))


def _name(model: str | PathLike[str]) -> "str | Path":
    return model if isinstance(model, str) else Path(model)


def _steps(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("preprocess_cfg", {})
    except (OSError, ValueError, AttributeError) as error:
        kind = MissingError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path} cannot be read: give a folder with it, or model= as well ({error})") from error


def _from_steps(steps: dict[str, Any], size: tuple[int, int]) -> Preprocess:
    """open_clip's preprocess_cfg -> Preprocess. Raises ValueError for steps that are not supported."""
    mean, std = tuple(steps.get("mean", CLIP_MEAN)), tuple(steps.get("std", CLIP_STD))
    mode, interpolation = steps.get("resize_mode", "shortest"), steps.get("interpolation", "bicubic")
    if interpolation not in ("bicubic", "bilinear"):
        raise ValueError(f"preprocess_cfg: interpolation {interpolation!r} is not supported: bicubic or bilinear")
    if mode == "squash":
        return Preprocess(resize=size, mean=mean, std=std, filter=interpolation)
    if mode == "shortest" and size[0] == size[1]:
        return replace(shorter_side(size, mean, std), filter=interpolation)
    raise ValueError(f"preprocess_cfg: resize_mode {mode!r} to {size} is not supported: squash, or shortest and square")
