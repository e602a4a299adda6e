"""LAION's aesthetic predictor: how much people like a picture, whatever the prompt.

    score = mlp(f / |f|),   f: image embedding of OpenAI's CLIP ViT-L/14
    mlp: linear layers 768-1024-128-64-16-1, no activation in between

Source: the public release christophschuhmann/improved-aesthetic-predictor, Apache-2.0, trained on ratings of 1 to 10;
scores of real pictures lie between 4 and 7, and have no bounds.

What is matched: the release's preprocessing (shorter side to 224, bicubic, centre crop) and model, in float32 where the
release runs CLIP in float16 on a GPU.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmdr_rewards import weights
from dmdr_rewards.clip import shorter_side
from dmdr_rewards.frozen import Frozen, precision
from dmdr_rewards.preprocess import Preprocess, chosen
from dmdr_rewards.reward import RewardInfo, TowerReward, described
from dmdr_rewards.towers import Towers, open_clip_config, open_clip_towers, transformers_towers

_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
_LINEARS = (0, 2, 4, 6, 7)  # of the released nn.Sequential; in between lie the dropouts of its training
_WIDTHS = (1024, 128, 64, 16, 1)

_INFO = RewardInfo(
    name="aesthetic",
    description="how much people like a picture, about 1 to 10; the prompt is ignored",
    range=(-math.inf, math.inf),
    licence="Apache-2.0 (head), MIT (CLIP)",
    source="https://github.com/christophschuhmann/improved-aesthetic-predictor",
    prompt="none",
    differentiable=True,
    image_size=(224, 224),
    preprocess="shorter side to 224, bicubic, antialias; centre crop 224x224; CLIP's mean and std",
    checkpoint=(
        f"OpenAI's CLIP ViT-L/14, in open_clip's format (file) or in transformers' (folder), with head={_HEAD}; or a "
        "folder that holds both"
    ),
)


@described(_INFO)
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

    checkpoint  OpenAI's CLIP ViT-L/14: a file in open_clip's format, or a folder that holds open_clip_model.safetensors
                or open_clip_pytorch_model.bin, or, with a config.json, transformers' model.safetensors. OpenAI's own
                ViT-L-14.pt is a program (TorchScript) and is refused
    head        sac+logos+ava1-l14-linearMSE.pth; without it, the file of that name in the folder
    model       the architecture of a file in open_clip's format, as in the reward `clip`; always with QuickGELU
    preprocess  "reference": shorter side and centre crop; "dmdr": squash. They agree on square pictures
    gradient_checkpointing  recompute the image tower's layers in the backward pass; changes no value

    Raises ValueError for files that are missing, damaged, unsafe or of another model.
    """
    path = Path(checkpoint)
    if head is None and not path.is_dir():
        raise ValueError(f"checkpoint {path} is a file: give head={_HEAD} too, or a folder with both")
    head = Path(head) if head is not None else weights.find(path, _HEAD)
    if (path / "config.json").exists():
        towers = transformers_towers(path, device, dtype, gradient_checkpointing)
    else:
        config = {**open_clip_config(model), "quick_gelu": True}
        towers = open_clip_towers(path, config, device, dtype, gradient_checkpointing)
    return Aesthetic(towers, _mlp(head), chosen(preprocess, shorter_side(towers.image_size)))


class Aesthetic(TowerReward):
    """mlp(unit image embedding). Formula, source and range are at the top of this module."""

    def __init__(self, towers: Towers, mlp: nn.Module, preprocess: Preprocess) -> None:
        self.towers, self.tower, self.preprocess = towers, towers.image, preprocess
        self._mlp = Frozen(mlp, self.tower.device, precision(self.tower.dtype))
        self.info = replace(_INFO, image_size=preprocess.image_size, preprocess=str(preprocess))

    def score_features(self, features: Tensor, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B features, Tensor[B, D] -> float32 Tensor[B]; the B prompts are counted, not read."""
        if isinstance(prompts, str) or len(prompts) != len(features):
            raise ValueError(f"{len(features)} images but {len(prompts)} prompts: give a list, one prompt per picture")
        return self._mlp(F.normalize(features, dim=-1)).squeeze(-1).float()


def _mlp(path: Path) -> nn.Sequential:
    tensors = weights.load(path)
    first = tensors.get("layers.0.weight")
    inputs = first.shape[-1] if first is not None and first.ndim else 0
    with torch.device("meta"):
        sizes = zip((inputs, *_WIDTHS), _WIDTHS, strict=False)
        linears = {f"layers.{index}": nn.Linear(*pair) for index, pair in zip(_LINEARS, sizes, strict=True)}
    shapes = {
        f"{name}.{part}": tuple(tensor.shape)
        for name, linear in linears.items()
        for part, tensor in linear.state_dict().items()
    }
    weights.check(tensors, shapes, path)
    for name, linear in linears.items():
        linear.load_state_dict({part: tensors[f"{name}.{part}"] for part in ("weight", "bias")}, assign=True)
    return nn.Sequential(*linears.values())
