"""Where samples come from: the generator's own few-step simulation, of prompts and fresh noise or of pairs."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from dmdr_core import (
    CoefficientsPreserving,
    authors_states,
    final_samples,
    gaussian_step,
    randn,
    rollout,
    visited_states,
)
from dmdr_core.base.devices import on_device
from dmdr_core.rollouts import Mode, step_of
from dmdr_models.families.protocols import Condition, Family
from torch import Tensor

from dmdr_train.base.random_draws import Draws
from dmdr_train.data.pairs import Pairs
from dmdr_train.data.prompt_order import Prompts, Start
from dmdr_train.distributed.frozen_weights import with_weights
from dmdr_train.recipe.picture_sizes import Size
from dmdr_train.recipe.schema import Recipe
from dmdr_train.training.sample import Sample
from dmdr_train.training.update_size import update_size

STATES = {"visited": visited_states, "authors": authors_states}

ENDS = frozenset({"final_x0", "final_pictures"})
"""What objectives need that look at the ends of rollouts."""

SHARED = {"own": (), "steps": ("rollout", "finish"), "all": ("noise", "rollout", "finish")}
"""The noise that the samples of a group share, by `rollout.group_noise`; never that of the step they are trained at."""


class Made(NamedTuple):
    """What a sample is made of.

    Attributes:
        shares: the samples of a group share noise.
        positions: `[B]` int64, the position in the grid that each sample is trained at; on the CPU.
        x_t: `[B, C, H, W]`, the states there; with gradient if gradients flow through the steps before.
        prediction: `[B, C, H, W]`, of the generator at these states.
    """

    start: Start
    condition: Condition
    shares: bool
    positions: Tensor
    x_t: Tensor
    prediction: Tensor


class Rollouts:
    """Draws samples of the generator.

    With `rollout.reuse`, the fake score learns from what the generator's own update has drawn in this step: `draw`
    keeps every micro-batch, without its graph, until the next step.

    With `rollout.group_noise`, the samples of a group share noise while an objective compares the ends of their
    rollouts. Samples that are drawn for the fake score alone share none.

    Args:
        generator: engine (or module) of the network.
        prompts: what samples are made for, from fresh noise.
        decode: makes the pictures of a sample that rewards see.
        pairs: where samples start instead while an objective needs pairs.
    """

    def __init__(
        self,
        settings: Recipe,
        family: Family,
        generator: Any,
        prompts: Prompts,
        decode: Callable[[Sample], Tensor],
        device: torch.device,
        pairs: Pairs | None = None,
    ):
        self.settings = settings.rollout
        self.mode: Mode = (
            self.settings.mode if self.settings.mode != "cps" else CoefficientsPreserving(self.settings.fresh_noise)
        )
        self.in_step = settings.optim.zero_stage == 3
        self.family = family
        self.sizes = settings.model.sizes or [Size(*family.size)]
        self.generator = generator
        self.prompts = prompts
        self.decode = decode
        self.device = device
        self.pairs = pairs
        self.grid = family.grid(self.settings.steps, self.settings.shift)
        self._kept: dict[tuple[int, ...], tuple[int, Made, tuple[Tensor, Tensor] | None]] = {}

    def draw(self, draws: Draws, step: int, needs: Collection[str] = ()) -> Sample:
        """The generator's x0 at a grid time drawn per sample, on the state that `rollout.states` says.

        Only the last prediction carries gradient; with `rollout.through`, so do those before it.

        Args:
            step: of the training.
            needs: of the objectives that the sample is for.
        """
        return self._sample(self._make(draws, step, needs, STATES[self.settings.states]), draws, step)

    def predict_again(self, sample: Sample, draws: Draws) -> Sample:
        """A sample that `draw` made, with the x0 that the generator predicts at its states now, with gradient.

        The states, the next states, and what the sample keeps of its rollout stay as they were drawn.

        Args:
            draws: of this update, for renoise times, noise, and whatever else is drawn anew.
        """
        prediction = self.family.predict(self.generator, sample.x_t, sample.t, sample.condition)
        x0 = self.family.process.to_x0(sample.x_t, prediction, sample.t)
        return replace(sample, x0=x0, draws=draws, again=True)

    @torch.no_grad()
    def draw_for_fake_score(self, draws: Draws, step: int, needs: Collection[str] = ()) -> Sample:
        """What the fake score learns from: by default a new sample, without gradient, and with all noise its own.

        With the states of the public trainers, a deterministic rollout goes to its end, and its final x0 is the sample.

        With `rollout.reuse`, it is the sample that `draw` made in this step at the same positions of the global batch,
        or, with `states`, another state of its rollout; noise that its group shares is then shared here, too. Its draws
        are those of this update, so the renoise times and the noise are fresh.
        """
        if self.settings.reuse != "none":
            return self._sample(self._reused(draws, step), draws, step)
        needs = set(needs) - ENDS
        if self.settings.states == "authors" and self.settings.mode == "ode":
            return self._sample(self._make(draws, step, {*needs, "final_sample"}, visited_states), draws, step)
        return self.draw(draws, step, needs)

    def _make(self, draws: Draws, step: int, needs: Collection[str], states: Any) -> Made:
        start, shares = self.start(draws, needs), self.shares(needs)
        condition = self.family.condition(start.prompts)
        positions = self.choose_steps(draws, needs)
        walk = None
        with torch.set_grad_enabled(self.settings.through and torch.is_grad_enabled()):
            if self.settings.reuse == "states":
                walk = self._walk(self.noise_of("rollout", draws, shares), start, condition)
                x_t, t = _pick(walk[0], positions), self._times(positions)
            else:
                x_t, t = states(
                    self._predict_rows(condition), self.family.process, self.grid, start.noise,
                    positions, self.mode, self.noise_of("rollout", draws, shares), self.in_step,
                )  # fmt: skip
        made = Made(start, condition, shares, positions, x_t, self.family.predict(self.generator, x_t, t, condition))
        if self.settings.reuse != "none":
            self._kept[tuple(draws.samples)] = (
                step,
                made._replace(x_t=x_t.detach(), prediction=made.prediction.detach()),
                walk,
            )
        return made

    def _predict_rows(self, condition: Condition) -> Any:
        def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
            asked = {name: value[rows] for name, value in condition.items()}
            return self.family.predict(self.generator, x, time, asked)

        return predict

    def _walk(self, fresh: list[torch.Generator], start: Start, condition: Condition) -> tuple[Tensor, Tensor]:
        """The states and the predictions of a whole rollout, both `[N, B, C, H, W]`, for a grid of N steps."""
        states: list[Tensor] = []
        predictions: list[Tensor] = []

        def predict(x: Tensor, time: Tensor) -> Tensor:
            states.append(x)
            predictions.append(self.family.predict(self.generator, x, time, condition))
            return predictions[-1]

        rollout(predict, self.family.process, self.grid, start.noise, self.mode, fresh)
        return torch.stack(states), torch.stack(predictions)

    def _reused(self, draws: Draws, step: int) -> Made:
        """What `draw` made of these samples; with whole rollouts, the state that is this update's turn.

        Update number n takes each sample n + 1 positions further than it was trained at, in a circle: as many updates
        as the grid has steps see every state once, and the positions stay uniform.
        """
        drawn, made, walk = self._kept[tuple(draws.samples)]
        if drawn != step:
            raise RuntimeError(f"the samples that are kept are of step {drawn}, not of {step}; call draw first")
        if walk is None:
            return made
        positions = (made.positions + int(draws.update[1]) + 1) % self.grid.num_steps
        return made._replace(positions=positions, x_t=_pick(walk[0], positions), prediction=_pick(walk[1], positions))

    def _sample(self, made: Made, draws: Draws, step: int) -> Sample:
        start, positions = made.start, made.positions
        prediction = made.prediction.detach()  # `advance` may outlive this update, without its graph

        def advance(sample: Sample) -> Tensor:
            return self.next_state(replace(sample, draws=draws), prediction, positions)

        t = self._times(positions)
        x0 = self.family.process.to_x0(made.x_t, made.prediction, t)
        group = [index // self.settings.group_size for index in draws.samples]
        return Sample(
            x0, start.prompts, made.condition, draws, step,
            made.x_t.detach(), t, self._times(positions + 1), group,
            self.decode, advance, start.target,
            positions.tolist(), self.grid.num_steps,
            None if self.settings.mode == "ode" else self._spread, partial(self._finish, shares=made.shares),
            self._predict_with,
        )  # fmt: skip

    def _spread(self, sample: Sample, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The distribution of the next states; see `Sample.next_distribution`."""
        return gaussian_step(self.family.process, sample.x_t, x0, sample.t, sample.t_next, self.settings.fresh_noise)

    @torch.no_grad()
    def _finish(self, sample: Sample, shares: bool) -> Tensor:
        """The final samples of the rollouts that go on from the next states of a sample."""
        return final_samples(
            self._predict_rows(sample.condition), self.family.process, self.grid, sample.next_state,
            torch.tensor(sample.positions) + 1, self.mode, self.noise_of("finish", sample.draws, shares), self.in_step,
        )  # fmt: skip

    @torch.no_grad()
    def _predict_with(self, sample: Sample, weights: Mapping[str, Tensor]) -> Tensor:
        """The x0 at the states of a sample by other weights; see `Sample.x0_with`."""
        with with_weights(self.generator, weights):
            prediction = self.family.predict(self.generator, sample.x_t, sample.t, sample.condition)
        return self.family.process.to_x0(sample.x_t, prediction, sample.t)

    def _times(self, positions: Tensor) -> Tensor:
        """The grid's times at some positions, `[B]`, on the device."""
        return on_device(self.grid.times[positions], self.device)

    def start(self, draws: Draws, needs: Collection[str] = ()) -> Start:
        """Where samples start: at pairs while an objective needs them, otherwise at fresh noise."""
        if "pairs" in needs:
            assert self.pairs is not None
            return self.pairs.draw(draws)
        size = self.settings.group_size
        if size == 1:
            prompts = self.prompts.draw(draws)
        else:
            leaders = [index // size for index in draws.samples[::size]]
            drawn = self.prompts.draw(replace(draws, samples=leaders))
            prompts = [prompt for prompt in drawn for _ in range(size)]
        shape = self.family.latent_shape(*update_size(self.sizes, draws))
        noise = self.noise_of("noise", draws, self.shares(needs))
        return Start(prompts, randn((len(prompts), *shape), noise, device=self.device))

    def shares(self, needs: Collection[str]) -> bool:
        """Whether the samples of a group share noise: where an objective compares the ends of their rollouts."""
        return self.settings.group_noise != "own" and "groups" in needs and bool(ENDS & set(needs))

    def noise_of(self, purpose: str, draws: Draws, shares: bool) -> list[torch.Generator]:
        """A generator per sample; for noise that a group shares, each is that of the group's first sample."""
        if shares and purpose in SHARED[self.settings.group_noise]:
            size = self.settings.group_size
            draws = replace(draws, samples=[index - index % size for index in draws.samples])
        return draws.each(purpose)

    def choose_steps(self, draws: Draws, needs: Collection[str] = ()) -> Tensor:
        """The position in the grid that each sample is trained at, `[B]`: uniform, or the last for a final sample."""
        if "final_sample" in needs:
            return torch.full((len(draws.samples),), self.grid.num_steps - 1)
        if self.shares(needs) or "group_positions" in needs:
            size = self.settings.group_size
            of_groups = replace(draws, samples=[index // size for index in draws.samples[::size]])
            return self.choose_steps(of_groups).repeat_interleave(size)
        if self.settings.positions == "stratified":
            first = int(torch.randint(self.grid.num_steps, (), generator=draws.shared("grid_step")))
            return torch.tensor([stratified_position(first, i, self.grid.num_steps) for i in draws.samples])
        return torch.cat([torch.randint(self.grid.num_steps, (1,), generator=g) for g in draws.each("grid_step")])

    @torch.no_grad()
    def next_state(self, sample: Sample, prediction: Tensor, chosen: Tensor) -> Tensor:
        """The states that the rollout goes to from a sample; see `Sample.next_state`."""
        step, process = step_of(self.mode), self.family.process
        fresh = sample.draws.each("next_state")
        moved = step(process, sample.x_t, prediction, sample.t, sample.t_next, fresh)
        last = (chosen == self.grid.num_steps - 1).reshape(-1, *[1] * (moved.ndim - 1))
        return torch.where(on_device(last, moved.device), sample.x0.detach().to(moved.dtype), moved)


def stratified_position(first: int, index: int, steps: int) -> int:
    """The position in a grid of `steps` of the sample at `index` in the global batch.

    Two neighbours, at an even index and the next, have positions k and steps − 1 − k, so that both together ask the
    generator as often as any other two. Neighbours that follow each other have other k: with an even number of steps,
    `steps` samples from an even index on have all positions. If `first` is uniform, so is the position of every sample.
    """
    k = (first + index - index % 2) % steps
    return steps - 1 - k if index % 2 else k


def _pick(walk: Tensor, positions: Tensor) -> Tensor:
    """Of `[N, B, …]`, each sample at its own position: `[B, …]`."""
    rows = torch.arange(len(positions))
    return walk[on_device(positions, walk.device), on_device(rows, walk.device)]
