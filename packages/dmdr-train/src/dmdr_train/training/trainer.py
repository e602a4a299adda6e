"""The training step of DMDR. It knows neither the model family nor the rewards nor how many machines there are.

A step is `ratio` updates of the fake score, each on new samples of the generator, then one update of the generator.
Where no distributions are matched, nobody asks the fake score, and it is left as it is.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from dmdr_core import authors_states, randn, visited_states
from dmdr_models.families.protocols import Family
from torch import Tensor

from dmdr_train.base.random_draws import Draws, seed_others
from dmdr_train.data.pairs import Pairs
from dmdr_train.data.prompt_order import Prompts, Start
from dmdr_train.objectives.terms import DistributionMatching, Objective, Regression, Sample
from dmdr_train.recipe import schema

STATES = {"visited": visited_states, "authors": authors_states}


class Teacher:
    """The guidance network without its LoRA."""

    def __init__(self, guidance: Any):
        self.base = guidance

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.base(*inputs, lora_scale=0.0, **named)


class Trainer:
    """Owns nothing that a checkpoint would not hold: two engines, the weights of the objectives, and the step.

    Args:
        generator, guidance: engines (or modules) of the two networks; the guidance network is called with a
            `lora_scale`.
        objectives: the terms of the generator's loss, distribution matching first.
        prompts: what samples are made for, from fresh noise.
        pairs: what they start from instead while there is regression.
        decode: makes the pictures of a sample that rewards see.
        rank, world: this process and how many there are; each takes its share of the global batch.
        mean: averages values over the processes.
    """

    def __init__(
        self,
        settings: schema.Recipe,
        family: Family,
        generator: Any,
        guidance: Any,
        objectives: Sequence[Objective],
        prompts: Prompts,
        decode: Callable[[Sample], Tensor],
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        mean: Callable[[dict[str, float]], dict[str, float]] = dict,
        pairs: Pairs | None = None,
    ):
        self.settings = settings
        self.family = family
        self.generator = generator
        self.guidance = guidance
        self.objectives = objectives
        self.prompts = prompts
        self.pairs = pairs
        self.decode = decode
        self.device = device
        self.rank, self.world = rank, world
        self.mean = mean
        rollout = settings.rollout
        self.grid = family.grid(rollout.steps, rollout.shift)
        self.step = 0
        self.drawn: list[Any] = []
        self.trouble: list[tuple[str, list[Any]]] = []

    def train_step(self) -> dict[str, float]:
        """One step; returns what is worth logging, of this process.

        An update whose loss or gradient is not finite anywhere is skipped by the engines of all processes. `trouble`
        then names what was not, and for which prompts of this process.
        """
        logs: dict[str, float] = {}
        self.trouble = []
        seed_others(self.settings.run.seed, self.step, self.rank)  # nothing here draws from them; a reward might
        if self.at_work(DistributionMatching):
            for i in range(self.settings.guidance.ratio):
                logs |= self.update_fake_score(self.step * self.settings.guidance.ratio + i)
        logs |= self.update_generator()
        self.step += 1
        return logs

    def at_work(self, kind: type = object) -> list[Any]:
        """The objectives of a kind that take part in this step."""
        return [o for o in self.objectives if isinstance(o, kind) and o.weight.active(self.step)]

    def update_fake_score(self, update: int) -> dict[str, float]:
        """Update number `update` of the fake score, over this process's micro-batches; what is worth logging."""
        losses = []
        for draws in self.micro_batches("fake_score", update):
            loss = self.fake_score_loss(draws)
            self.guidance.backward(loss * (1 + 0 * loss.detach()))  # an infinite loss poisons the update
            self.guidance.step()
            losses.append(loss.item())
            self.note("fake_score", losses[-1])
        return {"loss/fake_score": sum(losses) / len(losses)}

    def update_generator(self) -> dict[str, float]:
        """This step's update of the generator, over this process's micro-batches; what is worth logging."""
        logs: list[Mapping[str, float]] = []
        squares: dict[str, float] = defaultdict(float)
        for draws in self.micro_batches("generator", self.step):
            loss, values, gradients = self.generator_loss(draws)
            self.generator.backward(loss)
            self.generator.step()
            logs.append(values)
            for name, gradient in gradients.items():
                square = gradient.square().sum().item()
                squares[name] += square
                self.note(name, values[f"loss/{name}"], square)
        norms = self.balance(squares)
        means = {name: sum(values[name] for values in logs) / len(logs) for name in logs[0]}
        return means | {f"grad_norm/{name}": norm for name, norm in norms.items()}

    def balance(self, squares: dict[str, float]) -> dict[str, float]:
        """|∂L/∂x0| of every objective over the global batch, which the automatic weights follow."""
        parts = self.world * self.settings.optim.accumulation
        norms = {name: (square * self.world) ** 0.5 / parts for name, square in self.mean(squares).items()}
        for objective in self.objectives:
            if objective.name in norms:
                objective.weight.observe(norms[objective.name], norms.get("distribution_matching", 0.0))
        return norms

    def note(self, name: str, *numbers: float) -> None:
        """Keep the prompts of the last sample as trouble, if the numbers that came from it are not finite."""
        if not all(map(math.isfinite, numbers)):
            self.trouble.append((name, self.drawn))

    def fake_score_loss(self, draws: Draws) -> Tensor:
        """What the fake score learns from, on samples that carry no gradient."""
        (matching,) = self.at_work(DistributionMatching)
        with torch.no_grad():
            sample = self.generate(draws)
        return matching.fake_score_loss(sample)

    def generator_loss(self, draws: Draws) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
        """Σ w_i · L_i over the objectives at work, all on one sample; and the gradient of each L_i at x0."""
        sample = self.generate(draws)
        at = replace(sample, x0=sample.x0.detach().requires_grad_())
        total, slope = 0.0, torch.zeros_like(at.x0)
        logs: dict[str, float] = {}
        gradients: dict[str, Tensor] = {}
        for objective in self.at_work():
            weight = objective.weight.at(self.step)
            loss, values = objective(at)
            # The graph from x0 to the pictures serves the next reward, too.
            (gradients[objective.name],) = torch.autograd.grad(loss, at.x0, retain_graph=True)
            slope += weight * gradients[objective.name] + 0 * loss.detach()  # an infinite loss poisons the update
            total += weight * loss.item()
            logs |= {f"loss/{objective.name}": loss.item(), f"weight/{objective.name}": weight, **values}
        carrier = (sample.x0 * slope).sum()  # its gradient is the objectives'; its value becomes theirs
        return carrier - carrier.detach() + total, logs, gradients

    def generate(self, draws: Draws) -> Sample:
        """The generator's x0 at a grid time drawn per sample, on the state that `rollout.states` says.

        Only the last prediction carries gradient.
        """
        start = self.start(draws)
        self.drawn = start.prompts
        condition = self.family.condition(start.prompts)
        chosen = self.choose_steps(draws).to(self.device)

        def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
            asked = {name: value[rows] for name, value in condition.items()}
            return self.family.predict(self.generator, x, time, asked)

        rollout, in_step = self.settings.rollout, self.settings.optim.zero_stage == 3
        states = STATES[rollout.states]
        with torch.no_grad():
            fresh = draws.each("rollout")
            x_t, t = states(predict, self.family.process, self.grid, start.noise, chosen, rollout.mode, fresh, in_step)
        x0 = self.family.process.to_x0(x_t, self.family.predict(self.generator, x_t, t, condition), t)
        return Sample(x0, start.prompts, condition, draws, self.step, self.decode, start.target)

    def start(self, draws: Draws) -> Start:
        """Where samples start: at pairs while there is regression, otherwise at fresh noise."""
        if self.at_work(Regression):
            assert self.pairs is not None
            return self.pairs.draw(draws)
        prompts = self.prompts.draw(draws)
        shape = self.family.latent_shape(*self.family.size)
        return Start(prompts, randn((len(prompts), *shape), draws.each("noise"), device=self.device))

    def choose_steps(self, draws: Draws) -> Tensor:
        """The position in the grid that each sample is trained at, `[B]`, uniform."""
        return torch.cat([torch.randint(self.grid.num_steps, (1,), generator=g) for g in draws.each("grid_step")])

    def micro_batches(self, update: str, number: int) -> list[Draws]:
        """This process's micro-batches of an update: consecutive samples of the global batch."""
        optim = self.settings.optim
        size = optim.batch_size // (self.world * optim.accumulation)
        first = self.rank * size * optim.accumulation
        starts = range(first, first + size * optim.accumulation, size)
        return [Draws(self.settings.run.seed, (update, number), range(s, s + size)) for s in starts]
