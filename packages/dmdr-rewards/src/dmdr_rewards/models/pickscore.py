"""PickScore: which picture people would pick for a prompt.

    score = exp(logit_scale) · cos(image, text)        a fine-tuned CLIP ViT-H-14 of transformers

Source: "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", arXiv 2305.01569, and the public
release yuvalkirstain/PickScore_v1, MIT. The scale is about 100; scores of real pictures lie between 18 and 24.

Scores equal those of transformers' model and its PIL-based processor up to rounding, for 8-bit pictures.
"""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.models.clip import ClipReward, shorter_side
from dmdr_rewards.networks.clip_towers import transformers_towers
from dmdr_rewards.pictures.preprocess import chosen


def reward(
    checkpoint: str | PathLike[str],
    preprocess: Literal["reference", "dmdr"] = "reference",
    gradient_checkpointing: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipReward:
    """The reward `pickscore`.

    checkpoint  folder in the layout of yuvalkirstain/PickScore_v1, with the tokenizer's files
    preprocess  "reference": shorter side and centre crop; "dmdr": squash. Both give the same score for square pictures
    gradient_checkpointing  recompute the image tower's layers in the backward pass to save memory; changes no value

    Raises ValueError for files that are missing, damaged, unsafe or of another model.
    """
    towers = transformers_towers(Path(checkpoint), device, dtype, gradient_checkpointing)
    reference = replace(shorter_side(towers.image_size), halves="down")
    return ClipReward(towers, chosen(preprocess, reference), BUILT_IN["pickscore"], scale=towers.logit_scale)
