"""LAION's aesthetic predictor: how much people like a picture. The prompt is not read.

    score = mlp(f / |f|),   f: image embedding of OpenAI's CLIP ViT-L/14
    mlp: linear layers 768-1024-128-64-16-1, no activation in between

Source: the public release christophschuhmann/improved-aesthetic-predictor, Apache-2.0, trained on ratings of 1 to 10.
Scores of real pictures lie between 4 and 7; the score is not bounded.

Preprocessing (shorter side to 224, bicubic, centre crop) and model are the release's, in float32; on a GPU the release
runs CLIP in float16.
"""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.interface.reward import TowerReward
from dmdr_rewards.models.clip import shorter_side
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.clip_towers import Towers, open_clip_config, open_clip_towers, transformers_towers
from dmdr_rewards.networks.frozen_network import FrozenNetwork, precision
from dmdr_rewards.networks.score_head import score_head
from dmdr_rewards.pictures.preprocess import Preprocess, chosen

_HEAD = "sac+logos+ava1-l14-linearMSE.pth"


def reward(
    checkpoint: str | PathLike[str],
    head: str | PathLike[str] | None = None,
    model: str = "ViT-L-14",
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> "Aesthetic":
    """The reward `aesthetic`.

    checkpoint  OpenAI's CLIP ViT-L/14: a file in open_clip's format, a folder with open_clip_model.safetensors or
                open_clip_pytorch_model.bin, or a folder with transformers' config.json and model.safetensors.
                OpenAI's own ViT-L-14.pt is a program (TorchScript) and is refused
    head        sac+logos+ava1-l14-linearMSE.pth; default: the file of that name in the folder
    model       the architecture of a file in open_clip's format, as in the reward `clip`; QuickGELU is always used
    preprocess  "reference": shorter side and centre crop; "dmdr": squash. Both give the same score for square pictures
    gradient_checkpointing  recompute the image tower's layers in the backward pass to save memory; changes no value

    Raises ValueError for files that are missing, damaged, unsafe or of another model.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise MissingError(f"checkpoint {path}: no such file or folder")
    if head is None and not path.is_dir():
        raise ValueError(f"checkpoint {path} is a file: give head={_HEAD} too, or a folder with both")
    head = Path(head) if head is not None else checkpoint_files.find(path, _HEAD)
    if (path / "config.json").exists():
        towers = transformers_towers(path, device, dtype, gradient_checkpointing)
    else:
        config = {**open_clip_config(model), "quick_gelu": True}
        towers = open_clip_towers(path, config, device, dtype, gradient_checkpointing)
    return Aesthetic(towers, _head(head), chosen(preprocess, shorter_side(towers.image_size)))


class Aesthetic(TowerReward):
    """mlp(unit image embedding). Formula, source and range are at the top of this module."""

    def __init__(self, towers: Towers, head: nn.Module, preprocess: Preprocess) -> None:
        self.towers, self.tower, self.preprocess = towers, towers.image, preprocess
        self._head = FrozenNetwork(head, self.tower.device, precision(self.tower.dtype))
        self.info = replace(
            BUILT_IN["aesthetic"], image_size=preprocess.image_size, preprocess=f"{preprocess}; {towers.activation}"
        )

    def score_features(self, features: Tensor, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B features, Tensor[B, D] -> float32 Tensor[B]. The prompts must be B in number; they are not read."""
        if isinstance(prompts, str) or len(prompts) != len(features):
            raise ValueError(f"{len(features)} images but {len(prompts)} prompts: give a list, one prompt per picture")
        return self._head(F.normalize(features, dim=-1)).squeeze(-1).float()


def _head(path: Path) -> nn.Module:
    tensors = checkpoint_files.load(path)
    first = tensors.get("layers.0.weight")
    inputs = first.shape[-1] if first is not None and first.ndim else 0
    with torch.device("meta"):
        head = nn.ModuleDict({"layers": score_head(inputs)})
    checkpoint_files.assign(head, tensors, path)
    return head["layers"]
