"""Waiting for the longest rollouts, of other processes or of samples that are computed at once, counted exactly."""

from itertools import accumulate

import torch

from dmdr_train.recipe.derived import Sections
from dmdr_train.recipe.step_work import finishes, walks_at_random
from dmdr_train.training.rollouts import stratified_position


def extra_predictions(recipe: Sections, world: int) -> float:
    """Predictions of the generator in a step for which a process waits on average, since the slowest makes more."""
    if world == 1 or not walks_at_random(recipe):
        return 0.0
    optim, rollout = recipe.optim, recipe.rollout
    own = optim.batch_size // world
    own_update = not finishes(recipe)  # rollouts that are finished are equally long
    updates = own_update + (recipe.guidance.ratio if rollout.reuse == "none" and recipe.needing("fake_score") else 0)
    return updates * (slowest(rollout.positions, rollout.steps, own, world) - own * (rollout.steps - 1) / 2)


def slowest(positions: str, steps: int, own: int, world: int) -> float:
    """The expected sum of positions on the process where it is largest.

    Args:
        positions: `independent` or `stratified`.
        steps: of the grid; a position is in 0 .. steps − 1.
        own: samples of each process.
    """
    if positions == "stratified":
        return sum(_stratified(first, steps, own, world) for first in range(steps)) / steps
    alone = torch.full((steps,), 1 / steps, dtype=torch.float64)
    sums = torch.ones(1, dtype=torch.float64)
    for _ in range(own):
        sums = torch.nn.functional.conv1d(sums.view(1, 1, -1), alone.view(1, 1, -1), padding=steps - 1).flatten()
    # E[max] = Σ P(max > s) over s ≥ 0, and P(max ≤ s) = P(sum ≤ s) ** world
    return float((1 - sums.cumsum(0).clamp(max=1) ** world).sum())


def longest(positions: str, steps: int, samples: int) -> float:
    """The expected largest position among samples that are computed at once; arguments as of `slowest`."""
    if positions == "stratified":
        return sum(max(stratified_position(first, i, steps) for i in range(samples)) for first in range(steps)) / steps
    return sum(1 - (k / steps) ** samples for k in range(1, steps))  # E[max] = Σ P(max ≥ k)


def _stratified(first: int, steps: int, own: int, world: int) -> int:
    reached = [0, *accumulate(stratified_position(first, index, steps) for index in range(own * world))]
    return max(reached[(rank + 1) * own] - reached[rank * own] for rank in range(world))
