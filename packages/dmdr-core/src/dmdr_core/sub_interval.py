"""Sub-interval matching under flow matching: noise is added to a state x_s of a rollout instead of to its x0.

A state ``x_s`` at time s is renoised to ``τ ≥ s``: ``x_τ = a x_s + σ ε`` with ``a = (1 - τ) / (1 - s)`` and
``σ² = τ² - a² s²``. If ``x_s = (1 - s) x0 + s ε'``, then ``x_τ`` has the law of ``(1 - τ) x0 + τ ε``; at ``s = 0`` both
are the same. The law of ``x_s`` may be any other, such as that of a few-step model on its way.

The velocity of a law at τ and its score are related by ``v(x) = -(x + τ ∇log p_τ(x)) / (1 - τ)``, and the score is the
expectation of ``-ε / σ`` given ``x_τ``. Therefore the velocity is the expectation of

    v* = -(x_τ - τ ε / σ) / (1 - τ) = -x_s / (1 - s) + c ε / σ,    c = τ + (1 - τ) s² / (1 - s)²,

which is the target of the fake score (AC-DMD, stage one of RTDMD, arXiv 2605.26108). ``x0 = x - τ v(x)`` stands for the
law's own prediction of the clean sample; along the reverse process down to s it is a martingale:
``x0(x_τ) = E[x0(x_τ') | x_τ]`` for ``s ≤ τ' ≤ τ``.

Times are numbers, or tensors ``[]`` or ``[B]``, from 0 (clean) to 1 (noise); arithmetic is float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.precision import working_dtype
from dmdr_core.process import Time

_BEFORE_NOISE = 1 - torch.finfo(torch.float32).eps / 2  # the last float32 before 1


def renoise_state(x_s: Tensor, noise: Tensor, s: Time, t: Time) -> Tensor:
    """Return ``x_t = a x_s + σ ε``, with a and σ from the head of this module.

    Args:
        x_s: states at time s, ``[B, ...]``.
        noise: ε, ``[B, ...]``.
        s: in [0, 1).
        t: τ, in [s, 1].

    Returns:
        ``[B, ...]`` in the dtype of ``x_s``.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, or a time is out of range (on an accelerator, a tensor is not read).
    """
    dtype, s, t = _checked(x_s, noise, s, t)
    a, sigma = _coefficients(s, t)
    return (a * x_s.to(dtype) + sigma * noise.to(dtype)).to(x_s.dtype)


def sub_interval_target(x_s: Tensor, noise: Tensor, s: Time, t: Time) -> Tensor:
    """Return σ v*, the target of the fake score's velocity at ``renoise_state(x_s, noise, s, t)``, times σ.

    ``σ v* = -σ x_s / (1 - s) + c ε``, with σ and c from the head of this module. It stays finite as t → s.

    Args:
        x_s: as in `renoise_state`, and so are all other arguments.
        noise: ε.
        s: a time.
        t: τ, a time.

    Returns:
        ``[B, ...]`` in float32 or better.

    Raises:
        TypeError: as in `renoise_state`.
        ValueError: as in `renoise_state`.
    """
    dtype, s, t = _checked(x_s, noise, s, t)
    _, sigma = _coefficients(s, t)
    c = t + (1 - t) * (s / (1 - s)) ** 2
    return c * noise.to(dtype) - sigma / (1 - s) * x_s.to(dtype)


def sub_interval_loss(prediction: Tensor, x_s: Tensor, noise: Tensor, s: Time, t: Time, most: float = 10.0) -> Tensor:
    """Return the denoising loss of a fake score on renoised states: ``mean w (σ F - sg(σ v*))²``.

    ``w = min(1 / σ², most)`` (AC-DMD, arXiv 2605.26108). Where ``σ² ≥ 1 / most`` this is ``mean (F - sg(v*))²``; nearer
    to s, where the target v* is mostly noise, the weight falls like σ². No gradient reaches ``x_s``.

    Args:
        prediction: F, the velocity that the fake score predicts at ``renoise_state(x_s, noise, s, t)``, ``[B, ...]``.
        x_s: as in `renoise_state`, and so are the next three.
        noise: ε.
        s: a time.
        t: τ, a time.
        most: the largest w, positive.

    Returns:
        A scalar in float32 or better.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, a time is out of range, or ``most`` is not positive and finite.
    """
    checks.samples(x_s=x_s, prediction=prediction)
    checks.number("most", most, 0.0, open_low=True)
    target = sub_interval_target(x_s, noise, s, t).detach()
    _, s, t = _checked(x_s, noise, s, t)
    _, sigma = _coefficients(s, t)
    weight = sigma.square().reciprocal().clamp(max=most)
    return (weight * (sigma * prediction.to(target.dtype) - target).square()).mean()


def ancestral_step(x_t: Tensor, x0: Tensor, noise: Tensor, t: Time, t_next: Time) -> Tensor:
    """Return a sample of the state at ``t_next`` given the state at ``t`` and its clean sample.

    With ``a = (1 - t) / (1 - t_next)`` and ``σ² = t² - a² t_next²``, the state is normal with mean
    ``(a t_next² x_t + (1 - t_next) σ² x0) / t²`` and standard deviation ``σ t_next / t`` (DDPM's posterior,
    arXiv 2006.11239, for flow matching). With a prediction in the place of x0, the mean is that of the reverse
    process exactly, and the deviation as ``t_next → t``.

    Args:
        x_t: ``[B, ...]``.
        x0: the clean sample, ``[B, ...]``.
        noise: ``[B, ...]``.
        t: in (0, 1].
        t_next: in [0, t], less than 1.

    Returns:
        ``[B, ...]`` in the dtype of ``x_t``.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, or a time is out of range (on an accelerator, a tensor is not read).
    """
    checks.samples(x_t=x_t, x0=x0, noise=noise)
    dtype, s, t = _checked(x_t, x0, t_next, t)
    a, sigma = _coefficients(s, t)
    mean = a * (s / t) ** 2 * x_t.to(dtype) + (1 - s) * (sigma / t) ** 2 * x0.to(dtype)
    return (mean + sigma * s / t * noise.to(dtype)).to(x_t.dtype)


def _checked(x: Tensor, y: Tensor, s: Time, t: Time) -> tuple[torch.dtype, Tensor, Tensor]:
    """Return the working dtype, and both times in it, shaped to multiply ``x``."""
    checks.samples(x_s=x, noise=y)
    dtype = working_dtype(x, y)
    first, last = (checks.one_per_sample(name, time, x).to(dtype) for name, time in (("s", s), ("t", t)))
    checks.between("s", s, 0.0, _BEFORE_NOISE)
    checks.between("t", t, 0.0, 1.0)
    checks.between("t - s", (last - first).flatten(), 0.0, 1.0)
    return dtype, first, last


def _coefficients(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and σ; σ² = t² - a² s² as a product, which loses no digits as t → s."""
    a = (1 - t) / (1 - s)
    return a, ((t - s) / (1 - s) * (t + a * s)).sqrt()
