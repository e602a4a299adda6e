"""`dmdr-score verify`: check that a file is the checkpoint of a reward, and that the reward scores a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmdr_rewards.base.errors import UserError, naming
from dmdr_rewards.interface import registry
from dmdr_rewards.networks import checkpoint_files
from dmdr_rewards.networks.known_files import compared
from dmdr_rewards.score.reward_arguments import parse_rewards

PROMPT = "a photo of a cat"


def verify(name: str, checkpoint: str, options: Sequence[str] = (), list_tensors: bool = False) -> None:
    """Load `checkpoint` strictly as the reward `name`, and print its size, its hash and a probe score.

    options       the reward's options, as KEY=VALUE
    list_tensors  also print each tensor's name, dtype and shape

    Raises UserError for an unknown reward, a checkpoint that the reward refuses, and a probe score that is not finite.
    """
    [reward_argument] = parse_rewards([name], [f"{name}.{option}" for option in options])
    with naming("NAME"):
        registry.describe(name)
    with naming("CHECKPOINT"):
        reward = registry.create(name, checkpoint, **reward_argument.options)
        tensors, digest = _tensors(Path(checkpoint)), checkpoint_files.sha256(checkpoint)
        prompt = 0 if reward.info.prompt == "class_label" else PROMPT
        with torch.inference_mode():
            score = reward.score(probe_picture()[None], [prompt]).item()
    if not math.isfinite(score):
        raise UserError("CHECKPOINT", f"{checkpoint} fits {name}, but its score of a picture is {score}")
    if list_tensors:
        for key, tensor in sorted(tensors.items()):
            print(f"{key}  {str(tensor.dtype).removeprefix('torch.')}  {list(tensor.shape)}")
    print(f"reward       {name}")
    print(f"tensors      {len(tensors):,}")
    print(f"parameters   {sum(tensor.numel() for tensor in tensors.values()):,}")
    print(f"sha256       {digest}")
    print(f"official     {compared(name, digest)}")
    print(f"preprocess   {reward.info.preprocess}")
    print(f"probe score  {score:.6g} (a synthetic picture, {'label' if prompt == 0 else 'prompt'} {prompt!r})")


def probe_picture() -> np.ndarray:
    """A synthetic landscape picture of ramps and rings, always the same: uint8 [192, 256, 3]."""
    down, right = np.mgrid[0:192, 0:256]
    rings = 127.5 * (1 + np.sin(np.hypot(down - 96, right - 128) / 6))
    return np.stack([right, down * 255 / 191, rings], axis=-1).astype(np.uint8)


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of the file, or of the files in the folder."""
    files = [checkpoint]
    if checkpoint.is_dir():
        files = sorted(file for file in checkpoint.glob("*") if file.suffix in checkpoint_files.WEIGHTS)
    return {name: tensor for file in files for name, tensor in checkpoint_files.load(file, "state_dict").items()}
