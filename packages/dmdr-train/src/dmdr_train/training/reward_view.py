"""What rewards see of a latent: the whole picture, a random square of it, or all of it at a lower resolution."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from dmdr_models.families.protocols import Family
from torch import Tensor

from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.recipe import schema
from dmdr_train.training.sample import Sample


class View:
    """Decodes a sample for its rewards; a crop and a lower resolution save memory in the decoder and in the rewards.

    A crop is a square whatever the shape of the picture; a lower resolution keeps the shape, but for whole latents.

    Args:
        sizes: (height, width) in pixels of the pictures of samples; empty: the family's own size.

    Raises:
        ValueError: a crop that is larger than a picture, or that the decoder cannot give.
        UserError: the lower resolution leaves nothing of the smallest picture.
    """

    def __init__(self, family: Family, memory: schema.Memory, sizes: Sequence[tuple[int, int]] = ()):
        self.family = family
        self.scale = memory.reward_scale
        self.side: int | None = None
        most = min(min(size) for size in sizes or [family.size])
        factor = family.size[0] // family.latent_shape(*family.size)[-2]
        if memory.reward_crop is not None:
            self.side, rest = divmod(memory.reward_crop, factor)
            if rest or memory.reward_crop > most:
                raise ValueError(f"{memory.reward_crop} must be a multiple of {factor}, at most the resolution {most}")
        seen = memory.reward_crop or most
        if seen // factor * self.scale < 1:
            raise UserError(
                "memory.reward_scale", f"{self.scale} of {seen} pixels is none; use {factor / seen:g} or more"
            )

    def __call__(self, sample: Sample) -> Tensor:
        latents = sample.x0
        if self.side is not None:
            latents = crop(latents, self.side, sample.draws)
        if self.scale != 1.0:
            latents = F.interpolate(latents, scale_factor=self.scale, mode="area", recompute_scale_factor=True)
        return self.family.decode(latents)


def crop(latents: Tensor, side: int, draws: Draws) -> Tensor:
    """A square of `side` from each of `[B, C, H, W]`, its place drawn per sample."""
    height, width = latents.shape[-2:]
    cut = []
    for latent, generator in zip(latents, draws.each("crop"), strict=True):
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        cut.append(latent[:, top : top + side, left : left + side])
    return torch.stack(cut)
