"""Reward terms: one number per picture in, one number per picture out. Higher rewards are better.

Rewards are ``[B]`` and finite; a NaN is an error, since it would otherwise spread into the weights. On an accelerator
their values are not read, and a NaN stays a NaN. Arithmetic is in float32, or in float64 if an input is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.precision import working_dtype


def hinge(reward: Tensor, margin: float = 0.7) -> Tensor:
    """Return how far each reward falls short of the margin.

    ``relu(margin - reward)``: a picture whose reward reaches the margin has no gradient (ReFL, arXiv 2304.05977, as
    used in DMDR, arXiv 2511.13649). The loss is the mean over the batch.

    Args:
        reward: ``[B]``.
        margin: a finite number; 0.7 suits rewards on CLIP's scale.

    Returns:
        ``[B]``, float32 or better, 0 or more.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``reward`` is not a vector, or holds NaN or infinity; ``margin`` is not finite.
    """
    checks.number("margin", margin)
    return torch.relu(margin - _vector("reward", reward))


def relative_reward(positive: Tensor, negative: Tensor, k: float = 0.1) -> Tensor:
    """Return the reward of a picture under a wanted description relative to an unwanted one.

    ``(1 + k) · positive - negative`` (SRPO, arXiv 2509.06942). For unit features this equals the similarity to
    ``(1 + k) f_pos - f_neg``, which is not normalised again.

    Args:
        positive: rewards under the wanted prompt, ``[B]``.
        negative: rewards of the same pictures under the unwanted prompt, ``[B]``.
        k: a finite number.

    Returns:
        ``[B]``, float32 or better.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ or are not vectors, a reward is NaN or infinite, or ``k`` is not finite.
    """
    checks.samples(positive=positive, negative=negative)
    checks.number("k", k)
    dtype = working_dtype(positive, negative)
    return (1 + k) * _vector("positive", positive).to(dtype) - _vector("negative", negative).to(dtype)


@torch.no_grad()
def group_advantage(rewards: Tensor, group_size: int) -> Tensor:
    """Return each reward relative to its group.

    ``(r - mean) / std`` within each group of ``group_size`` consecutive entries, std being the population's (divided by
    ``group_size``). A constant group, and thus also a group of one, gives exactly 0 (GRPO, arXiv 2402.03300).

    Args:
        rewards: ``[B]``, B a multiple of ``group_size``.
        group_size: at least 1; the samples of one prompt.

    Returns:
        ``[B]``, float32 or better, detached, since an advantage is a weight and not a loss.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``rewards`` is not a vector, holds NaN or infinity, or its length is no multiple of ``group_size``.
    """
    checks.count("group_size", group_size, 1)
    values = _vector("rewards", rewards)
    if len(values) % group_size:
        raise ValueError(
            f"rewards has {len(values)} entries, no multiple of group_size = {group_size}: give whole groups"
        )
    groups = values.reshape(-1, group_size)
    # Scaled to [0, 1] first, so that neither tiny nor huge spreads are lost; a constant group becomes exactly 0.
    above = groups - groups.amin(dim=1, keepdim=True)
    spread = above.amax(dim=1, keepdim=True)
    scaled = torch.where(spread > 0, above / spread, 0.0)
    centred = scaled - scaled.mean(dim=1, keepdim=True)
    std = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(spread > 0, centred / std, 0.0).flatten()


def _vector(name: str, rewards: Tensor) -> Tensor:
    checks.samples(**{name: rewards})
    if rewards.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(rewards.shape)}: give one number per picture, [B]")
    checks.all_finite(name, rewards)
    return rewards.to(working_dtype(rewards))
