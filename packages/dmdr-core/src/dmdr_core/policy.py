"""Stochastic steps of a rollout as a Gaussian policy: the distribution of the next state, and losses of its density.

A step predicts x0 and draws the next state x_s around it. Its density is therefore a function of x0, and a reward
that has no gradient can train the generator through this density (policy gradients).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.precision import working_dtype
from dmdr_core.process import Process, Time


def gaussian_step(
    process: Process, x_t: Tensor, x0: Tensor, t: Time, t_next: Time, eta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the next state in a stochastic step.

    With the signal a_s and the noise σ_s of the process at ``t_next``, and the noise ε̂ = (x_t − a_t x0) / σ_t that the
    prediction implies, the next state is ``x_s = a_s x0 + σ_s (cos(ηπ/2) ε̂ + sin(ηπ/2) ε)`` with fresh noise ε
    (coefficients-preserving sampling, arXiv 2509.05952). Its mean is ``a_s x0 + σ_s cos(ηπ/2) ε̂`` and its standard
    deviation ``σ_s sin(ηπ/2)``. η = 1 is the renoising of ``"sde"``, with the mean ``a_s x0``; η = 0 is the
    deterministic step of ``"ode"``, up to a difference of the order of ``t_end``.

    Args:
        process: the noise process.
        x_t: ``[B, ...]``, the states that were predicted at; t must not be the time of a clean sample.
        x0: ``[B, ...]``, what was predicted there. Gradients flow through it.
        t: times of ``x_t``.
        t_next: times of the next states.
        eta: η in (0, 1].

    Returns:
        The mean ``[B, ...]`` and the standard deviation, ``[B, 1, ...]`` or ``[1, 1, ...]``, in the working precision.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, or a number is out of range.
    """
    checks.samples(x_t=x_t, x0=x0)
    checks.number("eta", eta, 0.0, 1 + 1e-9, open_low=True)
    dtype = working_dtype(x_t, x0)
    state, clean = x_t.to(dtype), x0.to(dtype)
    one = torch.ones_like(state[(slice(None), *[slice(0, 1)] * (state.ndim - 1))])
    spread, next_spread = (process.add_noise(torch.zeros_like(one), one, time) for time in (t, t_next))
    nothing = torch.zeros_like(clean)
    mean = process.add_noise(clean, nothing, t_next)
    if eta < 1:
        noise = (state - process.add_noise(clean, nothing, t)) / spread
        mean = mean + next_spread * math.cos(eta * math.pi / 2) * noise
    return mean, next_spread * math.sin(eta * math.pi / 2)


def gaussian_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the logarithm of a Gaussian density, divided by the number of dimensions D of a sample.

    ``mean over the dimensions of −(x − mean)² / (2 std²) − log std − ½ log 2π``; times D it is the exact log-density.
    Policy-gradient trainers of image generators average in this way (DDPO, arXiv 2305.13301; Flow-GRPO, arXiv
    2505.05470): the ratio of two densities grows exponentially with D, so no range to clip it would serve latents of
    all sizes. The direction of its gradient is that of the exact log-density.

    Args:
        x: ``[B, ...]``.
        mean: of the shape of ``x``.
        std: one number per sample, broadcast against ``x``; above 0.

    Returns:
        ``[B]``, in float32 or better.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.
    """
    checks.samples(x=x, mean=mean)
    checks.floating("std", std)
    dtype = working_dtype(x, mean)
    std = std.to(dtype)
    square = ((x.to(dtype) - mean.to(dtype)) / std).square()
    return (-0.5 * square - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).mean(dim=1)


def gaussian_kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """Return the KL divergence of two Gaussians with equal standard deviations, divided by the number of dimensions.

    ``mean over the dimensions of (mean − other)² / (2 std²)``. With the two means of :func:`gaussian_step` it is the
    divergence of a stochastic step from that of another policy at the same state.

    Args:
        mean: ``[B, ...]``, of the one distribution.
        other: of the shape of ``mean``, of the other.
        std: one number per sample, broadcast against ``mean``; above 0.

    Returns:
        ``[B]``, in float32 or better.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.
    """
    checks.samples(mean=mean, other=other)
    checks.floating("std", std)
    dtype = working_dtype(mean, other)
    return 0.5 * ((mean.to(dtype) - other.to(dtype)) / std.to(dtype)).square().flatten(1).mean(dim=1)


def policy_loss(log_density: Tensor, old_log_density: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return the clipped surrogate of a policy gradient.

    ``−min(ρ A, clamp(ρ, 1 − clip, 1 + clip) A)`` with the ratio ``ρ = exp(new − old)`` (PPO, arXiv 1707.06347; GRPO,
    arXiv 2402.03300). Where both densities are equal, the gradient is that of ``−A · log_density``.

    Args:
        log_density: ``[B]``, of the policy that is trained, with gradient.
        old_log_density: ``[B]``, of the policy that made the samples; no gradient flows through it.
        advantage: ``[B]``, see `dmdr_core.group_advantage`.
        clip: above 0.

    Returns:
        ``[B]``.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, or ``clip`` is not above 0.
    """
    checks.samples(log_density=log_density, old_log_density=old_log_density, advantage=advantage)
    checks.number("clip", clip, 0.0, open_low=True)
    ratio = (log_density - old_log_density.detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
