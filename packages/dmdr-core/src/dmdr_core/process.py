"""Noise processes: the meaning of a time, how noise is added, and what a network predicts.

| | FlowMatching | VariancePreserving |
|---|---|---|
| time ``t`` | real, 0 (clean) to 1 (noise) | integer, 0 (clean) to T - 1 (noise) |
| noisy sample ``x_t`` | (1 - t) x0 + t ε | √ᾱ_t x0 + √(1 - ᾱ_t) ε |
| prediction and its target | velocity v = ε - x0 | noise ε |
| models | SiT, SD3, SD3.5 | SDXL |

Shapes: samples, noise and predictions share one shape ``[B, ...]``; a time is a number, or a tensor ``[]`` or ``[B]``.

Dtypes: times and all arithmetic are float32, or float64 if an input is float64, whatever the network's own dtype.
``add_noise``, ``target`` and ``step`` return the dtype of their sample (the network's input); ``to_x0`` keeps the
working precision, so that the difference of two x0 predictions is not lost in rounding. Pass times in float32: bf16
rounds 0.626 to 0.625, and this module cannot undo that.

Errors, in every method: ``TypeError`` for a tensor or a time of the wrong kind, ``ValueError`` for shapes that differ,
a time tensor that is neither ``[]`` nor ``[B]``, and a time out of range or NaN. The values of a time tensor on an
accelerator are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.precision import working_dtype

Time = Tensor | float


class Process(Protocol):
    """The interface of a noise process; write your own by implementing these members."""

    @property
    def t_end(self) -> float:
        """The time at which sampling ends."""

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return x_t."""

    def target(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return the prediction that a network is trained to make at x_t."""

    def to_x0(self, x_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """Return the clean sample that a prediction implies."""

    def step(self, x_t: Tensor, prediction: Tensor, t: Time, t_next: Time) -> Tensor:
        """Return the state at ``t_next`` by one deterministic step."""

    def time_at(self, fraction: Tensor) -> Tensor:
        """Return the time at a fraction of the way from clean (0) to noise (1)."""

    def time_below(self, t: Tensor, fraction: Tensor) -> Tensor:
        """Return a time strictly cleaner than ``t``, at a fraction of the way from clean to ``t``."""


@dataclass(frozen=True)
class FlowMatching:
    """Linear interpolation between data and noise, with velocity prediction (rectified flow; Liu et al. 2209.03003).

    Args:
        t_end: where sampling ends, in [0, 1): 0.0 for SiT, 0.001 for SD3 and SD3.5.

    Raises:
        TypeError: ``t_end`` is not a number.
        ValueError: ``t_end`` is outside [0, 1).
    """

    t_end: float = 0.0

    def __post_init__(self) -> None:
        checks.number("t_end", self.t_end, 0.0, 1.0)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return ``x_t = (1 - t) x0 + t ε``, ``[B, ...]`` in the dtype of ``x0``; for errors see the module."""
        checks.samples(x0=x0, noise=noise)
        dtype = working_dtype(x0, noise)
        time = self._time("t", t, x0).to(dtype)
        return ((1 - time) * x0.to(dtype) + time * noise.to(dtype)).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return the velocity ``v = ε - x0``, ``[B, ...]`` in the dtype of ``x0``; for errors see the module."""
        checks.samples(x0=x0, noise=noise)
        self._time("t", t, x0)
        dtype = working_dtype(x0, noise)
        return (noise.to(dtype) - x0.to(dtype)).to(x0.dtype)

    def to_x0(self, x_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """Return ``x0 = x_t + (t_end - t) v``, ``[B, ...]`` in working precision; for errors see the module."""
        return self._move(x_t, prediction, t, self.t_end)

    def step(self, x_t: Tensor, prediction: Tensor, t: Time, t_next: Time) -> Tensor:
        """Return the Euler step ``x_t + (t_next - t) v``, ``[B, ...]`` in the dtype of ``x_t``.

        A step to ``t_end`` is `to_x0`, up to the dtype. For errors see the module.
        """
        return self._move(x_t, prediction, t, t_next).to(x_t.dtype)

    def time_at(self, fraction: Tensor) -> Tensor:
        """Return ``fraction`` itself, a tensor of any shape in [0, 1], in float32 or better.

        Raises:
            TypeError: ``fraction`` is not a floating-point tensor.
            ValueError: an entry is outside [0, 1] or NaN.
        """
        return _fraction(fraction)

    def time_below(self, t: Tensor, fraction: Tensor) -> Tensor:
        """Return ``fraction · t``, a time strictly less than ``t``.

        Args:
            t: times, ``[B]``, positive; on an accelerator that is not checked.
            fraction: ``[B]`` in [0, 1].

        Returns:
            ``[B]`` in float32 or better, in [0, t).

        Raises:
            TypeError: an argument is not a floating-point tensor.
            ValueError: an entry of ``fraction`` is outside [0, 1] or NaN, or one of ``t`` is not in (0, 1].
        """
        checks.floating("t", t)
        checks.between("t", t, torch.finfo(t.dtype).tiny, 1.0)
        share = _fraction(fraction).to(working_dtype(t, fraction))
        t = t.to(share.dtype)
        return torch.minimum(share * t, torch.nextafter(t, torch.zeros_like(t)))

    def _move(self, x_t: Tensor, velocity: Tensor, t: Time, t_next: Time) -> Tensor:
        checks.samples(x_t=x_t, prediction=velocity)
        dtype = working_dtype(x_t, velocity)
        span = self._time("t_next", t_next, x_t).to(dtype) - self._time("t", t, x_t).to(dtype)
        return x_t.to(dtype) + span * velocity.to(dtype)

    def _time(self, name: str, t: Time, x: Tensor) -> Tensor:
        if isinstance(t, Tensor):
            checks.floating(name, t)
        time = checks.one_per_sample(name, t, x)
        checks.between(name, t, 0.0, 1.0)
        return time


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """The discrete variance-preserving process with noise prediction (DDPM, Ho et al. 2006.11239).

    Args:
        alphas_cumprod: ``ᾱ``, ``[T]``, decreasing within (0, 1]: diffusers' ``scheduler.alphas_cumprod``. It is copied
            and stays on its device; give it on the device of your samples, otherwise every call copies it there.

    Raises:
        TypeError: ``alphas_cumprod`` is not a floating-point tensor.
        ValueError: it is not a vector, or its values do not decrease within (0, 1]. Zero is refused because there
            a noise prediction does not determine x0.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        checks.floating("alphas_cumprod", self.alphas_cumprod)
        if self.alphas_cumprod.ndim != 1 or len(self.alphas_cumprod) == 0:
            shape = tuple(self.alphas_cumprod.shape)
            raise ValueError(f"alphas_cumprod has shape {shape}: give a vector, one entry per timestep")
        table = self.alphas_cumprod.detach().to(working_dtype(self.alphas_cumprod), copy=True)
        if not bool((table > 0).all() & (table <= 1).all() & (table.diff() < 0).all()):
            first, last = table[0].item(), table[-1].item()
            raise ValueError(
                f"alphas_cumprod (first {first:g}, last {last:g}) does not decrease within (0, 1]: "
                "give the cumulative product of 1 - β, clean end first, without a zero"
            )
        object.__setattr__(self, "alphas_cumprod", table)

    @property
    def t_end(self) -> float:
        """Timestep 0, where sampling ends."""
        return 0.0

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return ``x_t = √ᾱ_t x0 + √(1 - ᾱ_t) ε``, ``[B, ...]`` in the dtype of ``x0``; for errors see the module."""
        checks.samples(x0=x0, noise=noise)
        dtype = working_dtype(x0, noise)
        signal, spread = self._coefficients("t", t, x0, dtype)
        return (signal * x0.to(dtype) + spread * noise.to(dtype)).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return the noise ``ε``, ``[B, ...]`` in the dtype of ``x0``; for errors see the module."""
        checks.samples(x0=x0, noise=noise)
        self._time("t", t, x0)
        return noise.to(x0.dtype)

    def to_x0(self, x_t: Tensor, prediction: Tensor, t: Time) -> Tensor:
        """Return ``x0 = (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t``, ``[B, ...]`` in working precision; for errors see the module."""
        checks.samples(x_t=x_t, prediction=prediction)
        dtype = working_dtype(x_t, prediction)
        signal, spread = self._coefficients("t", t, x_t, dtype)
        return (x_t.to(dtype) - spread * prediction.to(dtype)) / signal

    def step(self, x_t: Tensor, prediction: Tensor, t: Time, t_next: Time) -> Tensor:
        """Return the DDIM step with η = 0 (Song et al. 2010.02502), ``[B, ...]`` in the dtype of ``x_t``.

        ``√ᾱ_next x0 + √(1 - ᾱ_next) ε`` with ``x0`` from `to_x0`. For errors see the module.
        """
        x0 = self.to_x0(x_t, prediction, t)
        signal, spread = self._coefficients("t_next", t_next, x_t, x0.dtype)
        return (signal * x0 + spread * prediction.to(x0.dtype)).to(x_t.dtype)

    def time_at(self, fraction: Tensor) -> Tensor:
        """Return the timestep ``min(floor(fraction · T), T - 1)``, int64: a uniform fraction is a uniform timestep.

        Raises:
            TypeError: ``fraction`` is not a floating-point tensor.
            ValueError: an entry is outside [0, 1] or NaN.
        """
        last = len(self.alphas_cumprod) - 1
        return (_fraction(fraction) * (last + 1)).long().clamp(max=last)

    def time_below(self, t: Tensor, fraction: Tensor) -> Tensor:
        """Return the timestep ``min(floor(fraction · t), t - 1)``: a uniform fraction is uniform on 0, …, t - 1.

        Args:
            t: timesteps, ``[B]``, integers of at least 1; on an accelerator that is not checked.
            fraction: ``[B]`` in [0, 1].

        Returns:
            ``[B]`` int64, less than ``t``.

        Raises:
            TypeError: ``fraction`` is not a floating-point tensor, or ``t`` holds no integers.
            ValueError: an entry of ``fraction`` is outside [0, 1] or NaN, or one of ``t`` is less than 1 or too large.
        """
        time = self._time("t", t, t).flatten()
        checks.between("t", t, 1, len(self.alphas_cumprod) - 1)
        return torch.minimum((_fraction(fraction).double() * time).long(), time - 1)

    def _coefficients(self, name: str, t: Time, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        alpha = self.alphas_cumprod.to(x.device)[self._time(name, t, x)]
        return alpha.sqrt().to(dtype), (1 - alpha).sqrt().to(dtype)

    def _time(self, name: str, t: Time, x: Tensor) -> Tensor:
        time = checks.one_per_sample(name, t, x)
        if time.is_floating_point() or time.is_complex() or time.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {time.dtype}: a variance-preserving process takes integer timesteps")
        checks.between(name, t, 0, len(self.alphas_cumprod) - 1)
        return time.long()


def _fraction(fraction: Tensor) -> Tensor:
    checks.floating("fraction", fraction)
    checks.between("fraction", fraction, 0.0, 1.0)
    return fraction.to(working_dtype(fraction))
