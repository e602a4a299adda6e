"""The states at which a few-step generator is trained: a grid time per sample, and x_t there.

There are two choices with one interface. `visited_states` returns the states that sampling visits, so that the
generator is trained on the states that it meets in use. `authors_states` does the same as the public DMDR
trainers, for comparison.

Here the model is ``predict(x_t, t, rows) -> prediction``: ``rows``, int64, holds the batch positions of the samples in
``x_t``. A sample is not simulated further than it needs. If you give a generator per sample
(`dmdr_core.randomness`), a sample's state does not depend on where the others stop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.devices import on_device
from dmdr_core.grid import Grid
from dmdr_core.process import Process
from dmdr_core.randomness import Generators, randn
from dmdr_core.rollouts import Mode, step_of

PredictRows: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def visited_states(
    predict: PredictRows,
    process: Process,
    grid: Grid,
    noise: Tensor,
    chosen: Tensor,
    mode: Mode = "sde",
    generator: Generators = None,
    in_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """Simulate each sample up to the grid time chosen for it; these are the states of `dmdr_core.rollout`.

    Args:
        predict: the model, see the head of this module.
        process: its noise process.
        grid: its grid, of N steps.
        noise: ``[B, ...]``, the states at the first grid time.
        chosen: ``[B]`` int64, the position of each sample's grid time, in [0, N). On the CPU, nothing is read back from
            a device.
        mode: ``"sde"``, ``"ode"`` or a ``CoefficientsPreserving``, see `dmdr_core.rollouts`.
        generator: of the fresh noise.
        in_step: predict all samples at all N - 1 times, needed or not. ZeRO-3 spreads the weights over processes, and
            all processes must call the network equally often.

    Returns:
        The states ``[B, ...]`` and their times ``[B]``.

    Raises:
        ValueError: an unknown mode, or a position that the grid does not have.
    """
    advance, chosen = step_of(mode), _checked(grid, noise, chosen)
    times = _moved(grid.times, noise)
    everyone, states = torch.arange(len(noise)), noise.clone()
    for step in range(grid.num_steps - 1):
        going = everyone[chosen > step]
        asked = everyone if in_step else going
        if len(asked) == 0:
            break
        rows = _moved(asked, noise)
        prediction = predict(states[rows], times[step].expand(len(asked)), rows)
        if len(going):
            if in_step:
                rows = _moved(going, noise)
                prediction = prediction[rows]
            t, t_next = times[step].expand(len(going)), times[step + 1].expand(len(going))
            states[rows] = advance(process, states[rows], prediction, t, t_next, _pick(generator, going))
    return states, _moved(grid.times[chosen], noise)


def authors_states(
    predict: PredictRows,
    process: Process,
    grid: Grid,
    noise: Tensor,
    chosen: Tensor,
    mode: Mode = "sde",
    generator: Generators = None,
    in_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """Renoise an x0 of the simulation to the time chosen for each sample; sampling visits other states.

    In ``"ode"`` this is the final x0, whatever the chosen time; in ``"sde"`` it is the x0 predicted at the chosen time.
    Source: the public trainers of DMDR.

    Args:
        predict: as in `visited_states`, and so are all other arguments.
        process: noise process.
        grid: grid.
        noise: ``[B, ...]``.
        chosen: ``[B]``.
        mode: as in `visited_states`.
        generator: of all fresh noise.
        in_step: predict all samples at all times.

    Returns:
        The states ``[B, ...]`` and their times ``[B]``.

    Raises:
        ValueError: as in `visited_states`.
    """
    chosen = _checked(grid, noise, chosen)
    last = torch.full_like(chosen, grid.num_steps - 1)
    stops = last if mode == "ode" else chosen
    x_t, t = visited_states(predict, process, grid, noise, stops, mode, generator, in_step)
    everyone = torch.arange(len(noise), device=noise.device)
    x0 = process.to_x0(x_t, predict(x_t, t, everyone), t)
    fresh = randn(x0.shape, generator, device=x0.device, dtype=x0.dtype)
    times = _moved(grid.times[chosen], noise)
    return process.add_noise(x0, fresh, times).to(noise.dtype), times


def final_samples(
    predict: PredictRows,
    process: Process,
    grid: Grid,
    states: Tensor,
    positions: Tensor,
    mode: Mode = "sde",
    generator: Generators = None,
    in_step: bool = False,
) -> Tensor:
    """Simulate each sample from a state of its rollout to the end; these are the final samples of such a rollout.

    Args:
        predict: the model, see the head of this module.
        process: its noise process.
        grid: its grid, of N steps.
        states: ``[B, ...]``, the states at ``positions``.
        positions: ``[B]`` int64 in [1, N], on the CPU; a sample at N is finished.
        mode: as in `visited_states`.
        generator: of the fresh noise.
        in_step: predict all samples at all times but the first, needed or not; see `visited_states`.

    Returns:
        The final samples x0, ``[B, ...]`` in the dtype of the states.

    Raises:
        ValueError: an unknown mode, or a position that the grid does not have.
    """
    advance, positions = step_of(mode), _checked(grid, states, positions, first=1)
    times, states, everyone = _moved(grid.times, states), states.clone(), torch.arange(len(states))
    for step in range(1 if in_step else int(positions.min()), grid.num_steps):
        going = everyone[positions <= step]
        asked = everyone if in_step else going
        rows = _moved(asked, states)
        prediction = predict(states[rows], times[step].expand(len(asked)), rows)
        if len(going) == 0:
            continue
        if in_step:
            rows = _moved(going, states)
            prediction = prediction[rows]
        t, t_next = times[step].expand(len(going)), times[step + 1].expand(len(going))
        if step == grid.num_steps - 1:
            states[rows] = process.to_x0(states[rows], prediction, t).to(states.dtype)
        else:
            states[rows] = advance(process, states[rows], prediction, t, t_next, _pick(generator, going))
    return states


def _checked(grid: Grid, noise: Tensor, chosen: Tensor, first: int = 0) -> Tensor:
    checks.samples(noise=noise)
    chosen, end = chosen.cpu(), grid.num_steps + first
    if chosen.shape != noise.shape[:1] or not bool(((chosen >= first) & (chosen < end)).all()):
        raise ValueError(
            f"chosen = {chosen.tolist()}: give one position in [{first}, {end}) for each of {len(noise)} samples"
        )
    return chosen


def _moved(values: Tensor, like: Tensor) -> Tensor:
    return on_device(values, like.device)


def _pick(generator: Generators, rows: Tensor) -> Generators:
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [generator[row] for row in rows.tolist()]
