"""HPS v2.1: which picture people would prefer for a prompt.

    score = image · text        embeddings of unit length of a fine-tuned ViT-H-14, without a logit scale

Source: "Human Preference Score v2", arXiv 2306.09341, and the public release tgxs002/HPSv2, code and weights
Apache-2.0. Scores lie in [−1, 1], those of real pictures between 0.2 and 0.4.

Scores equal those of the package hpsv2 1.2.0 up to rounding. Its preprocessing is a letterbox: the longer side is
resized to 224 (bicubic, on floats, without rounding to 8 bits), black bars are added, then CLIP's mean and std applied.
"""

import warnings
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.models.clip import ClipReward
from dmdr_rewards.networks.clip_towers import open_clip_config, open_clip_towers
from dmdr_rewards.pictures.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, chosen


def reward(
    checkpoint: str | PathLike[str],
    model: str = "ViT-H-14",
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipReward:
    """The reward `hpsv2.1`.

    checkpoint  HPS_v2.1_compressed.pt, or the same tensors as .safetensors
    model       the architecture, as in the reward `clip`
    preprocess  "reference": letterbox; "dmdr": squash. Both give the same score for square pictures
    gradient_checkpointing  recompute the image tower's layers in the backward pass to save memory; changes no value

    Raises ValueError for files that are missing, damaged, unsafe or of another model.
    """
    if "2.1" not in Path(checkpoint).name and Path(checkpoint).name.lower().startswith("hps_v2"):
        warnings.warn(
            f"checkpoint {checkpoint} has the name of HPS v2.0's weights: the tensors have the same names and shapes, "
            "but the scores are not those of v2.1",
            stacklevel=3,
        )
    towers = open_clip_towers(Path(checkpoint), open_clip_config(model), device, dtype, gradient_checkpointing)
    size = towers.image_size
    letterbox = Preprocess(max(size), side="longer", crop=size, mean=CLIP_MEAN, std=CLIP_STD, eight_bit=False)
    return ClipReward(towers, chosen(preprocess, letterbox), BUILT_IN["hpsv2.1"])
