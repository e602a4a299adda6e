"""The drawn pictures with their captions, and the VAE."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
)
from dmdr_train.problems import scenes
from small_models import (
    save,
    train_vae,
)
from torch import Tensor

HOME = Path(__file__).parents[2] / "packages/dmdr-train/src/dmdr_train/problems/scenes"
CAPTIONS = scenes.all_captions()
NUM_PICTURES = 40_000


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return `count` pictures as uint8 `[N, 3, 32, 32]`, and the indices of their captions in CAPTIONS `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(CAPTIONS), (count,), generator=generator)
    drawn = [scenes.draw([CAPTIONS[i] for i in part], generator).mul(255).round().byte() for part in index.split(2000)]
    return torch.cat(drawn), index


def make_vae(steps: int = 3200) -> None:
    data, _ = pictures(NUM_PICTURES, seed=1)
    save(train_vae(data, latent_channels=8, steps=steps), HOME / "teacher/vae")


def load_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(HOME / "teacher/vae", torch_dtype=torch.float32).eval()
