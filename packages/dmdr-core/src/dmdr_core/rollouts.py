"""Few-step simulation of the generator: the states that a few-step model visits when it samples.

``predict(x_t, t) -> prediction`` is called with ``x_t`` of shape ``[B, ...]``, in the dtype of the noise, and ``t`` of
shape ``[B]``. The mode says how the simulation moves from one grid time to the next:

- ``"sde"``: predict x0, renoise it to the next grid time with fresh noise (DMD2's backward simulation,
  arXiv 2405.14867);
- ``"ode"``: the process's deterministic step;
- ``CoefficientsPreserving(eta)``: a part of the predicted noise is kept, and the rest replaced by fresh noise.

Gradients flow through the whole simulation if they are enabled; wrap the call in ``torch.no_grad()`` if you need none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.devices import on_device
from dmdr_core.grid import Grid
from dmdr_core.policy import gaussian_step
from dmdr_core.process import Process
from dmdr_core.randomness import Generators, randn

Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Advance: TypeAlias = Callable[[Process, Tensor, Tensor, Tensor, Tensor, Generators], Tensor]
Mode: TypeAlias = str | Advance


@dataclass(frozen=True)
class Rollout:
    """A simulated trajectory.

    Attributes:
        states: the noisy samples x_t at which the model predicted, each ``[B, ...]``; the first is the noise.
        times: their grid times, ``[len(states)]``.
        x0: the x0 prediction at the last state, ``[B, ...]``; after all steps of the grid, the final sample.
    """

    states: tuple[Tensor, ...]
    times: Tensor
    x0: Tensor


def rollout(
    predict: Predict,
    process: Process,
    grid: Grid,
    noise: Tensor,
    mode: Mode = "sde",
    generator: Generators = None,
    num_steps: int | None = None,
) -> Rollout:
    """Simulate a few-step model from noise, with one call of ``predict`` per step.

    The states are exactly those that sampling visits (DMDR, arXiv 2511.13649; the public trainers differ). The result's
    ``x0`` is ``process.to_x0`` at the last state, in float32 or better; with flow matching this is also the
    result of the last Euler step.

    Args:
        predict: the model, see the head of this module.
        process: its noise process.
        grid: its grid; it must end at ``process.t_end``.
        noise: ``[B, ...]``, the state at the first grid time.
        mode: ``"sde"``, ``"ode"`` or a `CoefficientsPreserving`.
        generator: of the fresh noise, see `dmdr_core.randomness`; unused in ``"ode"``.
        num_steps: stop after this many steps; default: all of the grid's.

    Returns:
        The `Rollout`, with ``num_steps`` states.

    Raises:
        TypeError: an argument, or the result of ``predict``, is of the wrong kind.
        ValueError: an unknown mode, a number of steps that the grid does not have, a grid that ends elsewhere than the
            process, a prediction of another shape than the state, or not one generator per sample.
    """
    steps = grid.num_steps if num_steps is None else num_steps
    checks.count("num_steps", steps, 1)
    if steps > grid.num_steps:
        raise ValueError(f"num_steps = {steps} is more than the grid's {grid.num_steps}: give at most that")
    visited = list(islice(visit(predict, process, grid, noise, mode, generator), steps))
    x_t, t = visited[-1]
    x0 = process.to_x0(x_t, predict(x_t, t), t)
    return Rollout(tuple(state for state, _ in visited), on_device(grid.times[:steps], noise.device), x0)


def visit(
    predict: Predict,
    process: Process,
    grid: Grid,
    noise: Tensor,
    mode: Mode = "sde",
    generator: Generators = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Walk through the states of a `rollout`, one at a time.

    ``predict`` is called at a state only when the next state is requested: the first k + 1 states cost k predictions.
    A trainer can thus simulate up to a state without gradient and predict there with gradient.

    Args:
        predict: as in `rollout`, and so are all other arguments.
        process: noise process.
        grid: grid.
        noise: ``[B, ...]``.
        mode: ``"sde"``, ``"ode"`` or a `CoefficientsPreserving`.
        generator: of the fresh noise.

    Returns:
        An iterator over ``(x_t, t)``, ``[B, ...]`` and ``[B]``, one per step of the grid.

    Raises:
        TypeError: as in `rollout`.
        ValueError: as in `rollout`.
    """
    advance = step_of(mode)
    checks.samples(noise=noise)
    times = grid.times
    if not math.isclose(times[-1].item(), process.t_end, rel_tol=1e-6):
        raise ValueError(
            f"grid ends at {times[-1].item():g} and process at t_end = {process.t_end:g}: give both the same end"
        )
    return _walk(predict, process, on_device(times, noise.device), noise, advance, generator)


def _walk(
    predict: Predict, process: Process, times: Tensor, x_t: Tensor, advance: Advance, generator: Generators
) -> Iterator[tuple[Tensor, Tensor]]:
    t, *later = (time.expand(len(x_t)) for time in times[:-1])
    yield x_t, t
    for t_next in later:
        x_t, t = advance(process, x_t, predict(x_t, t), t, t_next, generator), t_next
        yield x_t, t


def _renoise(
    process: Process, x_t: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, generator: Generators
) -> Tensor:
    x0 = process.to_x0(x_t, prediction, t)
    fresh = randn(x0.shape, generator, device=x0.device, dtype=x0.dtype)
    return process.add_noise(x0, fresh, t_next).to(x_t.dtype)


def _follow(
    process: Process, x_t: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, generator: Generators
) -> Tensor:
    return process.step(x_t, prediction, t, t_next)


MODES: Mapping[str, Advance] = {"sde": _renoise, "ode": _follow}


@dataclass(frozen=True)
class CoefficientsPreserving:
    """A step in which a part of the predicted noise is replaced by fresh noise (coefficients-preserving sampling).

    The next state has the amounts of x0 and of noise that the process has at that time, whatever η is; see
    `dmdr_core.gaussian_step` (arXiv 2509.05952). η = 1 is ``"sde"``.

    Args:
        eta: η in (0, 1].

    Raises:
        TypeError: ``eta`` is not a number.
        ValueError: ``eta`` is out of range.
    """

    eta: float

    def __post_init__(self) -> None:
        checks.number("eta", self.eta, 0.0, 1 + 1e-9, open_low=True)

    def __call__(
        self, process: Process, x_t: Tensor, prediction: Tensor, t: Tensor, t_next: Tensor, generator: Generators
    ) -> Tensor:
        x0 = process.to_x0(x_t, prediction, t)
        mean, std = gaussian_step(process, x_t, x0, t, t_next, self.eta)
        return (mean + std * randn(x0.shape, generator, device=x0.device, dtype=x0.dtype)).to(x_t.dtype)


def step_of(mode: Mode) -> Advance:
    """Return the step that a mode stands for. Raises ValueError for an unknown name."""
    if not isinstance(mode, str):
        return mode
    checks.one_of("mode", mode, MODES)
    return MODES[mode]
