"""The training step of DMDR. It knows neither the model family nor the objectives nor how many machines there are.

A step is `guidance.ratio` updates of the fake score, each on new samples of the generator, then one update of the
generator. Where no objective matches distributions, the fake score is not trained.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from dmdr_models.families.protocols import Family
from torch import Tensor

from dmdr_train.base.random_draws import Draws, seed_others
from dmdr_train.recipe import schema
from dmdr_train.training.guide import Guide
from dmdr_train.training.objective import Objective
from dmdr_train.training.rollouts import Rollouts
from dmdr_train.training.sample import Sample


class Trainer:
    """Takes the steps of a run. All its state is in the checkpoint: two engines, the objectives' weights, the step.

    Args:
        generator: engine (or module) of the generator.
        guide: teacher and fake score.
        objectives: the terms of the generator's loss.
        rollouts: where samples come from.
        rank, world: this process and the number of processes; each takes its share of the global batch.
        mean: averages values over the processes.

    Attributes:
        trouble: what was not finite in the last step, and for which prompts of this process.
    """

    def __init__(
        self,
        settings: schema.Recipe,
        family: Family,
        generator: Any,
        guide: Guide,
        objectives: Sequence[Objective],
        rollouts: Rollouts,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        mean: Callable[[dict[str, float]], dict[str, float]] = dict,
    ):
        self.settings = settings
        self.family = family
        self.generator = generator
        self.guide = guide
        self.objectives = objectives
        self.rollouts = rollouts
        self.device = device
        self.rank, self.world = rank, world
        self.mean = mean
        self.step = 0
        self.trouble: list[tuple[str, list[Any]]] = []

    @property
    def guidance(self) -> Any:
        """The engine of the guidance network."""
        return self.guide.engine

    @property
    def rewards(self) -> list[Any]:
        """The rewards that objectives train on, each once."""
        rewards = [objective.reward for objective in self.objectives if objective.reward is not None]
        return list({reward.info.name: reward for reward in rewards}.values())

    def train_step(self) -> dict[str, float]:
        """Take one step; returns values to log, of this process.

        The engines of all processes skip an update whose loss or gradient is not finite on any of them; `trouble` then
        says what it was.
        """
        logs: dict[str, float] = {}
        self.trouble = []
        seed_others(self.settings.run.seed, self.step, self.rank)  # a reward might draw from the global generators
        if "fake_score" in self.needs():
            for i in range(self.settings.guidance.ratio):
                logs |= self.update_fake_score(self.step * self.settings.guidance.ratio + i)
        logs |= self.update_generator()
        self.step += 1
        return logs

    def at_work(self) -> list[Objective]:
        """The objectives that take part in this step."""
        return [objective for objective in self.objectives if objective.weight.active(self.step)]

    def needs(self) -> set[str]:
        """What the objectives of this step need."""
        return {need for objective in self.at_work() for need in objective.needs}

    def update_fake_score(self, update: int) -> dict[str, float]:
        """Take update number `update` of the fake score, over this process's micro-batches; returns values to log."""
        losses = []
        for draws in self.micro_batches("fake_score", update):
            with torch.no_grad():
                sample = self.rollouts.draw_for_fake_score(draws, self.step, self.needs())
            losses.append(self.guide.learn(sample))
            self.note("fake_score", sample, losses[-1])
        return {"loss/fake_score": sum(losses) / len(losses)}

    def update_generator(self) -> dict[str, float]:
        """Take this step's update of the generator, over this process's micro-batches; returns values to log."""
        logs: list[Mapping[str, float]] = []
        squares: dict[str, float] = defaultdict(float)
        for draws in self.micro_batches("generator", self.step):
            sample = self.rollouts.draw(draws, self.step, self.needs())
            loss, values, gradients = self.generator_loss(sample)
            self.generator.backward(loss)
            self.generator.step()
            logs.append(values)
            for name, gradient in gradients.items():
                square = gradient.square().sum().item()
                squares[name] += square
                self.note(name, sample, values[f"loss/{name}"], square)
        norms = self.balance(squares)
        means = {name: sum(values[name] for values in logs) / len(logs) for name in logs[0]}
        return means | {f"grad_norm/{name}": norm for name, norm in norms.items()}

    def generator_loss(self, sample: Sample) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
        """Σ w_i · L_i over the objectives at work, all on one sample; and the gradient of each L_i at x0."""
        at = replace(sample, x0=sample.x0.detach().requires_grad_())
        total, slope = 0.0, torch.zeros_like(at.x0)
        logs: dict[str, float] = {}
        gradients: dict[str, Tensor] = {}
        for objective in self.at_work():
            weight = objective.weight.at(self.step)
            loss, values = objective(at, self.guide)
            # The graph from x0 to the pictures serves the next reward, too.
            (gradients[objective.name],) = torch.autograd.grad(loss, at.x0, retain_graph=True)
            slope += weight * gradients[objective.name] + 0 * loss.detach()  # an infinite loss poisons the update
            total += weight * loss.item()
            logs |= {f"loss/{objective.name}": loss.item(), f"weight/{objective.name}": weight}
            logs |= {name: float(value) for name, value in values.items()}
        carrier = (sample.x0 * slope).sum()  # its gradient is the objectives'; its value becomes theirs
        return carrier - carrier.detach() + total, logs, gradients

    def balance(self, squares: dict[str, float]) -> dict[str, float]:
        """|∂L/∂x0| of every objective over the global batch.

        Automatic weights follow the first objective that matches distributions.
        """
        parts = self.world * self.settings.optim.accumulation
        norms = {name: (square * self.world) ** 0.5 / parts for name, square in self.mean(squares).items()}
        matching = next((o.name for o in self.objectives if o.name in norms and "fake_score" in o.needs), "")
        for objective in self.objectives:
            if objective.name in norms:
                objective.weight.observe(norms[objective.name], norms.get(matching, 0.0))
        return norms

    def note(self, name: str, sample: Sample, *numbers: float) -> None:
        """Keep the prompts of a sample as trouble, if numbers that follow from it are not finite."""
        if not all(map(math.isfinite, numbers)):
            self.trouble.append((name, sample.prompts))

    def micro_batches(self, update: str, number: int) -> list[Draws]:
        """This process's micro-batches of an update: consecutive samples of the global batch."""
        optim = self.settings.optim
        size = optim.batch_size // (self.world * optim.accumulation)
        first = self.rank * size * optim.accumulation
        starts = range(first, first + size * optim.accumulation, size)
        return [Draws(self.settings.run.seed, (update, number), range(s, s + size)) for s in starts]
