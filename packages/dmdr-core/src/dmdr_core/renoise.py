"""Renoise samplers: they draw the noise levels, from clean (0) to noise (1), at which the two scores are compared.

A sample is a fraction τ strictly inside (0, 1), float32, one per batch entry; ``process.time_at(τ)`` turns it into the
process's own time. The same sampler serves the distribution-matching term and the fake score's loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmdr_core.annealing import cosine_anneal
from dmdr_core.base import checks
from dmdr_core.randomness import Generators, draw_batch

_MARGIN = torch.finfo(torch.float32).eps / 2  # 1 - _MARGIN is the last float32 before 1


@dataclass(frozen=True)
class BetaRenoise:
    """Beta-distributed times that begin at high noise and anneal to uniform (DMDR's dynamic renoise sampling, DynaRS).

    At generator step k, ``τ ~ Beta(a, b)`` with ``a = cosine_anneal(alpha, 1, k, anneal_steps)`` and ``b`` likewise
    from ``beta``; Beta(1, 1) is uniform (arXiv 2511.13649).

    **With the default of** ``anneal_steps=0`` **there is no dynamic phase: τ is uniform at every step, and** ``alpha``
    **and** ``beta`` **have no effect.** For a Beta distribution that never anneals, give ``anneal_steps=math.inf``.

    Args:
        alpha: a at step 0, positive. A value larger than ``beta`` favours high noise.
        beta: b at step 0, positive.
        anneal_steps: length of the dynamic phase in generator steps, 0 or more, or ``math.inf``.

    Raises:
        TypeError: an argument is not a number, or ``anneal_steps`` is neither an int nor ``math.inf``.
        ValueError: an argument is out of range.
    """

    alpha: float = 4.0
    beta: float = 1.5
    anneal_steps: float = 0

    def __post_init__(self) -> None:
        checks.number("alpha", self.alpha, 0.0, open_low=True)
        checks.number("beta", self.beta, 0.0, open_low=True)
        if self.anneal_steps != math.inf:
            checks.count("anneal_steps", self.anneal_steps, 0)  # type: ignore[arg-type]

    def sample(
        self, batch: int, step: int, generator: Generators = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw one τ per batch entry.

        Args:
            batch: B, at least 1.
            step: the generator step k, 0 or more.
            generator: see `dmdr_core.randomness`.
            device: where the result goes; default: where it was drawn.

        Returns:
            ``[B]`` float32, strictly between 0 and 1.

        Raises:
            TypeError: ``batch`` or ``step`` is not an int, or ``generator`` is of the wrong kind.
            ValueError: ``batch`` or ``step`` is out of range, or there are not B generators.
        """
        checks.count("batch", batch, 1)
        checks.count("step", step, 0)
        a = cosine_anneal(self.alpha, 1.0, step, self.anneal_steps)
        b = cosine_anneal(self.beta, 1.0, step, self.anneal_steps)

        def draw(size: int, source: torch.Generator | None, where: torch.device | str | None) -> Tensor:
            shape = torch.tensor([[a, b]], dtype=torch.float64, device=where).expand(size, 2)
            x, y = torch._standard_gamma(shape, generator=source).unbind(1)  # X / (X + Y) is Beta; takes a generator
            return x / (x + y)

        return _inside(draw_batch(draw, batch, generator, device))


@dataclass(frozen=True)
class UniformRenoise:
    """Uniform times: every noise level is equally likely (DMD2, arXiv 2405.14867)."""

    def sample(
        self, batch: int, step: int, generator: Generators = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw one τ per batch entry, from the same distribution at every step; see `BetaRenoise.sample`."""
        checks.count("batch", batch, 1)
        checks.count("step", step, 0)

        def draw(size: int, source: torch.Generator | None, where: torch.device | str | None) -> Tensor:
            return torch.rand(size, generator=source, device=where, dtype=torch.float64)

        return _inside(draw_batch(draw, batch, generator, device))


def _inside(fraction: Tensor) -> Tensor:
    return fraction.clamp(_MARGIN, 1 - _MARGIN).float()
