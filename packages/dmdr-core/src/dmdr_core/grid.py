"""Step grids: the times at which a few-step model predicts.

``times`` has one entry more than there are steps. It starts at noise, decreases strictly, and ends where sampling ends;
the model predicts at every entry except the last. Flow matching takes a `StepGrid` (float32), a
variance-preserving process a `TimestepGrid` (int64). Times are built on the CPU; move them as you need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmdr_core.base import checks


class Grid(Protocol):
    """The interface that a rollout needs of a grid."""

    @property
    def num_steps(self) -> int:
        """The number of steps."""

    @property
    def times(self) -> Tensor:
        """The grid times, ``[num_steps + 1]``, decreasing."""


@dataclass(frozen=True)
class StepGrid:
    """Evenly spaced times in [0, 1], shifted towards noise (SD3, Esser et al. 2403.03206).

    ``u = linspace(1, t_end, num_steps + 1)``, ``t = shift · u / (1 + (shift - 1) · u)``; the last entry stays
    ``t_end``.

    Args:
        num_steps: at least 1.
        shift: positive; 1 for SiT, 3 for SD3-Medium, 5 for SD3.5-Large.
        t_end: in [0, 1), the same as the process's.

    Raises:
        TypeError: an argument is not a number, or ``num_steps`` not an int.
        ValueError: an argument is out of range, or ``shift`` is so extreme that the times do not decrease.
    """

    num_steps: int
    shift: float = 1.0
    t_end: float = 0.0

    def __post_init__(self) -> None:
        checks.count("num_steps", self.num_steps, 1)
        checks.number("shift", self.shift, 0.0, open_low=True)
        checks.number("t_end", self.t_end, 0.0, 1.0)
        if not bool((self.times.diff() < 0).all()):
            raise ValueError(
                f"shift = {self.shift} with num_steps = {self.num_steps} and t_end = {self.t_end} "
                "gives times that do not decrease: bring shift nearer to 1"
            )

    @property
    def times(self) -> Tensor:
        """The grid times, ``[num_steps + 1]`` float32, from 1 to ``t_end``."""
        even = torch.linspace(1.0, self.t_end, self.num_steps + 1, dtype=torch.float64)
        shifted = self.shift * even / (1 + (self.shift - 1) * even)
        shifted[-1] = self.t_end
        return shifted.float()


@dataclass(frozen=True)
class TimestepGrid:
    """Evenly spaced integer timesteps, for a variance-preserving process.

    ``linspace(num_timesteps - 1, 0, num_steps + 1)``, rounded. A one-step model is conditioned on timestep 399 of 1000
    (two fifths of the way) instead of 999, where errors of the network's output are amplified into noise artifacts
    (DMDR, SDXL recipe).

    Args:
        num_steps: at least 1.
        num_timesteps: T, the length of ``alphas_cumprod``; more than ``num_steps``.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of range.
    """

    num_steps: int
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        checks.count("num_steps", self.num_steps, 1)
        checks.count("num_timesteps", self.num_timesteps, self.num_steps + 1, "give more timesteps than steps")

    @property
    def times(self) -> Tensor:
        """The grid timesteps, ``[num_steps + 1]`` int64, down to 0."""
        if self.num_steps == 1:
            return torch.tensor([max(2 * self.num_timesteps // 5 - 1, 1), 0])
        return torch.linspace(self.num_timesteps - 1, 0, self.num_steps + 1, dtype=torch.float64).round().long()
