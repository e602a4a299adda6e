"""Losses on samples: means over all elements, computed in float32, or in float64 if an input is float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmdr_core.base import checks
from dmdr_core.base.precision import working_dtype


@torch.no_grad()
def dmd_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor, eps: float = 1e-8) -> Tensor:
    """Return the direction that moves generated samples against the distribution-matching objective.

    ``g = (x0_fake - x0_real) / (mean |x0 - x0_real| + eps)``, the mean taken per sample over all trailing dimensions;
    NaN becomes 0 (DMD, arXiv 2311.18828, eq. 7 and 8; DMDR, arXiv 2511.13649). A NaN in ``x0`` or ``x0_real`` therefore
    sets the gradient of its whole sample to 0, a NaN in ``x0_fake`` sets only its own entry to 0. Infinities stay, so
    that a loss scaler can see them.

    Args:
        x0: generated samples, ``[B, ...]``.
        x0_real: the teacher's x0 prediction on the renoised ``x0``, ``[B, ...]``.
        x0_fake: the fake score's x0 prediction at the same renoised point, ``[B, ...]``.
        eps: keeps the quotient finite; 0 or more.

    Returns:
        ``[B, ...]`` in float32 or better, detached.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, or ``eps`` is negative or not finite.
    """
    checks.samples(x0=x0, x0_real=x0_real, x0_fake=x0_fake)
    checks.number("eps", eps, 0.0)
    dtype = working_dtype(x0, x0_real, x0_fake)
    x0, x0_real, x0_fake = x0.to(dtype), x0_real.to(dtype), x0_fake.to(dtype)
    distance = mean_distance(x0, x0_real).reshape(-1, *[1] * (x0.ndim - 1))
    # In place: each further copy of the samples would cost as much time as the arithmetic.
    return (x0_fake - x0_real).div_(distance + eps).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


@torch.no_grad()
def mean_distance(x0: Tensor, x0_real: Tensor) -> Tensor:
    """Return the normaliser of distribution matching: mean |x0 - x0_real| per sample, over all trailing dimensions.

    Args:
        x0: generated samples, ``[B, ...]``.
        x0_real: the x0 prediction of a teacher at a renoised ``x0``, ``[B, ...]``.

    Returns:
        ``[B]`` in float32 or better, 0 or more, detached.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.
    """
    checks.samples(x0=x0, x0_real=x0_real)
    dtype = working_dtype(x0, x0_real)
    return (x0.to(dtype) - x0_real.to(dtype)).abs_().reshape(len(x0), -1).mean(dim=1)


@torch.no_grad()
def decoupled_gradient(
    x0_fake: Tensor,
    x0_cond: Tensor,
    ca_cond: Tensor,
    ca_uncond: Tensor,
    scale: Tensor | float,
    matching_norm: Tensor | float = 1.0,
    ca_norm: Tensor | float = 1.0,
    matching_weight: Tensor | float = 1.0,
    ca_weight: Tensor | float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """Return the direction of decoupled distribution matching: the teacher's guidance is a term of its own.

    ``g = a (x0_fake - x0_cond)(τ_DM) / (n + eps) - b (w - 1) (ca_cond - ca_uncond)(τ_CA) / (m + eps)``. The first term
    matches distributions without guidance, the second one is the CFG augmentation; each has a renoise time, a
    normaliser (n, m) and a weight (a, b) of its own. NaN becomes 0 (Decoupled DMD, arXiv 2511.22677).

    At one renoise time and with ``n = m = mean |x0 - x0_real|`` this is `dmd_gradient` with the guided teacher
    ``x0_real = ca_uncond + w (ca_cond - ca_uncond)``.

    Args:
        x0_fake: the fake score's x0 prediction at τ_DM, ``[B, ...]``.
        x0_cond: the teacher's x0 prediction there, with the prompt and without guidance, ``[B, ...]``.
        ca_cond: the teacher's x0 prediction at τ_CA with the prompt, ``[B, ...]``.
        ca_uncond: the teacher's x0 prediction there without a prompt, ``[B, ...]``.
        scale: the guidance scale w; a number, or a tensor ``[]`` or ``[B]``, and so are the next four.
        matching_norm: n, see `mean_distance`; 1 for none.
        ca_norm: m; 1 for none.
        matching_weight: a.
        ca_weight: b; the advantage of each sample weights its guidance by a reward.
        eps: keeps the quotients finite; 0 or more.

    Returns:
        ``[B, ...]`` in float32 or better, detached.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, or ``eps`` is negative or not finite.
    """
    checks.samples(x0_fake=x0_fake, x0_cond=x0_cond, ca_cond=ca_cond, ca_uncond=ca_uncond)
    checks.number("eps", eps, 0.0)
    dtype = working_dtype(x0_fake, x0_cond, ca_cond, ca_uncond)

    def each(name: str, value: Tensor | float) -> Tensor:
        return checks.one_per_sample(name, value, x0_fake).to(dtype)

    matching = (x0_fake.to(dtype) - x0_cond.to(dtype)) / (each("matching_norm", matching_norm) + eps)
    augmentation = (ca_cond.to(dtype) - ca_uncond.to(dtype)) / (each("ca_norm", ca_norm) + eps)
    augmentation *= each("ca_weight", ca_weight) * (each("scale", scale) - 1)
    direction = each("matching_weight", matching_weight) * matching - augmentation
    return direction.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


def dmd_loss(x0: Tensor, x0_real: Tensor, x0_fake: Tensor, eps: float = 1e-8, weight: Tensor | None = None) -> Tensor:
    """Return the scalar whose gradient with respect to ``x0`` is ``w · dmd_gradient(...) / numel``.

    ``½ mean w (x0 - sg(x0 - g))²``, sg the stop-gradient; its value is ``½ mean w g²`` (DMD, arXiv 2311.18828; DMDR,
    arXiv 2511.13649). No gradient reaches ``x0_real``, ``x0_fake`` and ``weight``. A second
    derivative raises a RuntimeError.

    Args:
        x0: generated samples, ``[B, ...]``, with gradient.
        x0_real: see `dmd_gradient`.
        x0_fake: see `dmd_gradient`.
        eps: see `dmd_gradient`.
        weight: ``[B]``, the weight w of each sample, as f-divergences use it (arXiv 2502.15681); 1 by default.

    Returns:
        A scalar in float32 or better.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, or ``eps`` is negative or not finite.
    """
    direction = dmd_gradient(x0, x0_real, x0_fake, eps)
    factors = None if weight is None else _factors(weight, direction)
    return _HalfSquare.apply(x0, direction, factors)


def surrogate_loss(x0: Tensor, direction: Tensor) -> Tensor:
    """Return the scalar whose gradient with respect to ``x0`` is ``direction / numel``.

    ``½ mean (x0 - sg(x0 - g))²``, sg the stop-gradient and g the direction; its value is ``½ mean g²``. With
    `dmd_gradient` as the direction it is `dmd_loss`. A second derivative raises a RuntimeError.

    Args:
        x0: generated samples, ``[B, ...]``, with gradient.
        direction: ``[B, ...]``, see `dmd_gradient` and `decoupled_gradient`; no gradient reaches it.

    Returns:
        A scalar in float32 or better.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.
    """
    checks.samples(x0=x0, direction=direction)
    return _HalfSquare.apply(x0, direction.detach().to(working_dtype(x0, direction), copy=True), None)


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean squared error of a denoiser: ``mean w (prediction - sg(target))²``.

    With ``target = process.target(x0, noise, t)`` this is flow matching (arXiv 2210.02747) or DDPM's simple loss
    (arXiv 2006.11239). No gradient reaches ``target``, so training the fake score does not change the generator.

    Args:
        prediction: ``[B, ...]``.
        target: ``[B, ...]``.
        weight: ``[B]``, the weight w of each sample, without gradient; 1 by default.

    Returns:
        A scalar in float32 or better.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes differ.
    """
    checks.samples(prediction=prediction, target=target)
    dtype = working_dtype(prediction, target)
    errors = (prediction.to(dtype) - target.detach().to(dtype)).square()
    return (errors if weight is None else errors * _factors(weight, errors)).mean()


class _HalfSquare(torch.autograd.Function):
    """``½ mean w u²``, ``u = x0 - sg(x0 - g)``, as one step of autograd that keeps only ``u``."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, direction: Tensor, factors: Tensor | None) -> Tensor:
        # u equals g where x0 is finite, and is NaN elsewhere. x0 - g itself would round a small g away.
        u = direction.add_(x0.to(direction.dtype), alpha=0)
        ctx.dtype = x0.dtype
        ctx.save_for_backward(u, factors)
        squares = u.square()
        return 0.5 * (squares if factors is None else squares.mul_(factors)).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        u, factors = ctx.saved_tensors
        each = slope / u.numel()
        return (u * (each if factors is None else each * factors)).to(ctx.dtype), None, None


def _factors(weight: Tensor, errors: Tensor) -> Tensor:
    """Return the weight ``[B]`` of each sample, shaped to multiply its errors, ``[B, ...]``."""
    checks.floating("weight", weight)
    if weight.shape != errors.shape[:1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give one weight for each of {len(errors)} samples")
    return weight.detach().to(errors.dtype).reshape(-1, *[1] * (errors.ndim - 1))
