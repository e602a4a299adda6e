"""Where samples come from: the generator's own few-step simulation, of prompts and fresh noise or of pairs."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from dmdr_core import authors_states, randn, visited_states
from dmdr_core.rollouts import MODES
from dmdr_models.families.protocols import Family
from torch import Tensor

from dmdr_train.base.random_draws import Draws
from dmdr_train.data.pairs import Pairs
from dmdr_train.data.prompt_order import Prompts, Start
from dmdr_train.recipe.picture_sizes import Size
from dmdr_train.recipe.schema import Recipe
from dmdr_train.training.sample import Sample
from dmdr_train.training.update_size import update_size

STATES = {"visited": visited_states, "authors": authors_states}


class Rollouts:
    """Draws samples of the generator.

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
        self.in_step = settings.optim.zero_stage == 3
        self.family = family
        self.sizes = settings.model.sizes or [Size(*family.size)]
        self.generator = generator
        self.prompts = prompts
        self.decode = decode
        self.device = device
        self.pairs = pairs
        self.grid = family.grid(self.settings.steps, self.settings.shift)

    def draw(self, draws: Draws, step: int, needs: Collection[str] = ()) -> Sample:
        """The generator's x0 at a grid time drawn per sample, on the state that `rollout.states` says.

        Only the last prediction carries gradient.

        Args:
            step: of the training.
            needs: of the objectives that the sample is for.
        """
        return self._draw(draws, step, needs, STATES[self.settings.states])

    def draw_for_fake_score(self, draws: Draws, step: int, needs: Collection[str] = ()) -> Sample:
        """What the fake score learns from: a sample as `draw` makes it, with one exception.

        With the states of the public trainers, a deterministic rollout goes to its end, and its final x0 is the sample.
        """
        if self.settings.states == "authors" and self.settings.mode == "ode":
            return self._draw(draws, step, {*needs, "final_sample"}, visited_states)
        return self.draw(draws, step, needs)

    def _draw(self, draws: Draws, step: int, needs: Collection[str], states: Any) -> Sample:
        start = self.start(draws, needs)
        condition = self.family.condition(start.prompts)
        chosen = self.choose_steps(draws, needs).to(self.device)

        def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
            asked = {name: value[rows] for name, value in condition.items()}
            return self.family.predict(self.generator, x, time, asked)

        process, mode = self.family.process, self.settings.mode
        with torch.no_grad():
            fresh = draws.each("rollout")
            x_t, t = states(predict, process, self.grid, start.noise, chosen, mode, fresh, self.in_step)
        prediction = self.family.predict(self.generator, x_t, t, condition)

        def advance(sample: Sample) -> Tensor:
            return self.next_state(sample, prediction.detach(), chosen)

        t_next = self.grid.times.to(self.device)[chosen + 1]
        x0 = process.to_x0(x_t, prediction, t)
        group = [index // self.settings.group_size for index in draws.samples]
        return Sample(
            x0, start.prompts, condition, draws, step, x_t, t, t_next, group, self.decode, advance, start.target
        )

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
        return Start(prompts, randn((len(prompts), *shape), draws.each("noise"), device=self.device))

    def choose_steps(self, draws: Draws, needs: Collection[str] = ()) -> Tensor:
        """The position in the grid that each sample is trained at, `[B]`: uniform, or the last for a final sample."""
        if "final_sample" in needs:
            return torch.full((len(draws.samples),), self.grid.num_steps - 1)
        return torch.cat([torch.randint(self.grid.num_steps, (1,), generator=g) for g in draws.each("grid_step")])

    @torch.no_grad()
    def next_state(self, sample: Sample, prediction: Tensor, chosen: Tensor) -> Tensor:
        """The states that the rollout goes to from a sample; see `Sample.next_state`."""
        step, process = MODES[self.settings.mode], self.family.process
        fresh = sample.draws.each("next_state")
        moved = step(process, sample.x_t, prediction, sample.t, sample.t_next, fresh)
        last = (chosen == self.grid.num_steps - 1).reshape(-1, *[1] * (moved.ndim - 1))
        return torch.where(last, sample.x0.detach().to(moved.dtype), moved)
