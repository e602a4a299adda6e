"""The training step of DMDR. It knows neither the model family nor the objectives nor how many machines there are.

A step is one rollout of the generator with one update, or with `rollout.updates` where an objective trains on final
pictures, and `guidance.ratio` updates of the fake score. By default the fake score comes first, with new samples of the
generator for every update. With `rollout.reuse` the generator comes first, and its samples serve the fake score. Where
no objective matches distributions, the fake score is not trained.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from dmdr_models.families.protocols import Family
from torch import Tensor

from dmdr_train.base.random_draws import Draws, seed_others
from dmdr_train.recipe import schema
from dmdr_train.training.guide import Guide
from dmdr_train.training.objective import Objective
from dmdr_train.training.picture_gradients import PictureGradients, Term, sum_at_x0
from dmdr_train.training.rollouts import Rollouts
from dmdr_train.training.sample import Sample


class Seen(NamedTuple):
    """What a micro-batch has shown; tensors are still on the device.

    Attributes:
        values: to log, scalar tensors or numbers.
        squares: |∂L/∂x0|² of objectives, by their names.
    """

    prompts: list[Any]
    values: Mapping[str, Any]
    squares: Mapping[str, Any] = {}


class Trainer:
    """Takes the steps of a run. Its state is in the checkpoint: two engines, discriminator, objectives, step.

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
        self.trouble = []
        seed_others(self.settings.run.seed, self.step, self.rank)  # a reward might draw from the global generators
        for objective in self.objectives:
            if self.step == objective.settings.start:
                objective.begin(self.generator)
        ratio = self.settings.guidance.ratio if "fake_score" in self.needs() else 0
        updates = range(self.step * self.settings.guidance.ratio, self.step * self.settings.guidance.ratio + ratio)
        if self.settings.rollout.reuse == "none":
            fake_score = [self.update_fake_score(update) for update in updates]
            generator = self.update_generator()
        else:
            # The generator first: its graph is gone before the fake score has one, and the fake score has not seen the
            # samples at which the objectives ask for its prediction.
            generator = self.update_generator()
            fake_score = [self.update_fake_score(update) for update in updates]
        logs = self.read(fake_score, generator)
        self.step += 1
        return logs

    def at_work(self) -> list[Objective]:
        """The objectives that take part in this step."""
        return [objective for objective in self.objectives if objective.weight.active(self.step)]

    def needs(self) -> set[str]:
        """What the objectives of this step need."""
        return {need for objective in self.at_work() for need in objective.needs}

    def update_fake_score(self, update: int) -> list[Seen]:
        """Take update number `update` of the fake score, over this process's micro-batches."""
        seen = []
        for draws in self.micro_batches("fake_score", update):
            sample = self.rollouts.draw_for_fake_score(draws, self.step, self.needs())
            seen.append(Seen(sample.prompts, {"loss/fake_score": self.guide.learn(sample)}))
        return seen

    def update_generator(self) -> list[list[Seen]]:
        """Take this step's updates of the generator, over this process's micro-batches.

        The first update draws the samples. In later ones the generator predicts again at the states of these samples,
        and only what the updates draw besides, such as renoise times, is new.
        """
        updates = self.settings.rollout.updates if "final_pictures" in self.needs() else 1
        drawn: list[Sample] = []
        seen: list[list[Seen]] = [[]]
        for draws in self.micro_batches("generator", self.step):
            sample = self.rollouts.draw(draws, self.step, self.needs())
            seen[0].append(self.learn(sample))
            if updates > 1:
                drawn.append(replace(sample, x0=sample.x0.detach()))
        self.guide.after_update(self.generator, self.step)
        for update in range(2, updates + 1):
            again = zip(drawn, self.micro_batches(f"generator-{update}", self.step), strict=True)
            seen.append([self.learn(self.rollouts.predict_again(sample, draws)) for sample, draws in again])
            self.guide.after_update(self.generator, self.step)
        return seen

    def learn(self, sample: Sample) -> Seen:
        """Take the generator's gradients on a micro-batch; the last micro-batch of an update takes the step."""
        loss, values, gradients = self.generator_loss(sample)
        self.generator.backward(loss)
        self.generator.step()
        values |= self.guide.learn_beside(sample, self.needs())
        return Seen(sample.prompts, values, {name: slope.square().sum() for name, slope in gradients.items()})

    def generator_loss(self, sample: Sample) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
        """Σ w_i · L_i over the objectives at work, all on one sample; and the gradient of each L_i at x0.

        Where several objectives see the pictures, their gradients at x0 are only there if weights or the log need them.
        """
        decoder = PictureGradients(sample.decode)
        at = replace(sample, x0=sample.x0.detach().requires_grad_(), decode=decoder)
        terms: list[Term] = []
        logs: dict[str, Any] = {}
        for objective in self.at_work():
            name, weight = objective.name, objective.weight.at(self.step)
            loss, values = objective(at, self.guide)
            terms.append(decoder.term(name, weight, loss, at.x0))
            logs |= {f"loss/{name}": loss.detach(), f"weight/{name}": weight, **values}
        apart = any(objective.weight.automatic for objective in self.at_work())
        slope, gradients = sum_at_x0(terms, decoder, at.x0, apart, self.settings.logged(self.step + 1))
        total = sum(term.weight * term.loss for term in terms)
        carrier = (sample.x0 * slope).sum()  # its gradient is the objectives'; its value becomes theirs
        return carrier - carrier.detach() + total, logs, dict(gradients)

    def read(self, fake_score: list[list[Seen]], generator: list[list[Seen]]) -> dict[str, float]:
        """Values to log, of the last update of the fake score and of the generator; they come in one transfer.

        Samples with numbers that are not finite become `trouble`. The automatic weights learn the gradients' norms of
        the generator's first update, since a policy's clip lowers those of later ones.
        """
        every = [each for update in (*fake_score, *generator) for each in update]
        found = numbers([each.values for each in every] + [each.squares for each in every])
        values, squares = found[: len(every)], found[len(every) :]
        for each, here, slopes in zip(every, values, squares, strict=True):
            for name in (key.removeprefix("loss/") for key in here if key.startswith("loss/")):
                if not (math.isfinite(here[f"loss/{name}"]) and math.isfinite(slopes.get(name, 0.0))):
                    self.trouble.append((name, each.prompts))
        size = self.settings.optim.accumulation
        own = size * len(fake_score)  # where the generator's begin
        logs = mean_of(values[:own][-size:]) | mean_of(values[own:][-size:])
        totals: dict[str, float] = defaultdict(float)
        for slopes in squares[own : own + size]:
            for name, square in slopes.items():
                totals[name] += square
        return logs | {f"grad_norm/{name}": norm for name, norm in self.balance(totals).items()}

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

    def micro_batches(self, update: str, number: int) -> list[Draws]:
        """This process's micro-batches of an update: consecutive samples of the global batch."""
        optim = self.settings.optim
        size = optim.batch_size // (self.world * optim.accumulation)
        first = self.rank * size * optim.accumulation
        starts = range(first, first + size * optim.accumulation, size)
        return [Draws(self.settings.run.seed, (update, number), range(s, s + size)) for s in starts]


def numbers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The same rows with numbers in the place of scalar tensors, which are read in one transfer."""
    tensors = [value.detach().double() for row in rows for value in row.values() if isinstance(value, Tensor)]
    read = iter(torch.stack(tensors).tolist() if tensors else [])
    return [{name: next(read) if isinstance(value, Tensor) else value for name, value in row.items()} for row in rows]


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each value over the rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}
