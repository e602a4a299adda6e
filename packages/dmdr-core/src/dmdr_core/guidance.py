"""Classifier-free guidance."""

from __future__ import annotations

from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.precision import working_dtype


def guided(cond: Tensor, uncond: Tensor, scale: Tensor | float) -> Tensor:
    """Extrapolate from the unconditional to the conditional prediction.

    ``uncond + scale · (cond - uncond)`` (Ho & Salimans, arXiv 2207.12598). Scale 1 is ``cond``, 0 is ``uncond``.

    Args:
        cond: ``[B, ...]``.
        uncond: ``[B, ...]``.
        scale: a number, or a tensor ``[]`` or ``[B]``.

    Returns:
        ``[B, ...]`` in the dtype of ``cond``, computed in float32 or better.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: shapes differ, or ``scale`` is NaN or infinite (on an accelerator, a tensor is not read).
    """
    checks.samples(cond=cond, uncond=uncond)
    dtype = working_dtype(cond, uncond)
    weight = checks.one_per_sample("scale", scale, cond).to(dtype)
    checks.all_finite("scale", scale)
    base = uncond.to(dtype)
    return (base + weight * (cond.to(dtype) - base)).to(cond.dtype)
