"""The training step of DMDR. It knows neither the model family nor the rewards nor how many machines there are.

A step is `ratio` updates of the fake score, each on new samples of the generator, then one update of the generator.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from dmdr_core import StepGrid, denoising_loss, randn, visit
from dmdr_models.family import Family
from torch import Tensor

from dmdr_train import recipe
from dmdr_train.data import Prompts
from dmdr_train.draws import Draws
from dmdr_train.objectives import Objective, Sample, renoise_sampler


class Trainer:
    """Owns nothing that a checkpoint would not hold: two engines and the step.

    Args:
        generator, guidance: engines (or modules) of the two networks; the guidance network is called with a
            `lora_scale`.
        objectives: the terms of the generator's loss.
        rank, world: this process and how many there are; each takes its share of the global batch.
    """

    def __init__(
        self,
        settings: recipe.Recipe,
        family: Family,
        generator: Any,
        guidance: Any,
        objectives: Sequence[Objective],
        prompts: Prompts,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ):
        self.settings = settings
        self.family = family
        self.generator = generator
        self.guidance = guidance
        self.objectives = objectives
        self.prompts = prompts
        self.device = device
        self.rank, self.world = rank, world
        self.renoise = renoise_sampler(settings.guidance)
        rollout = settings.rollout
        self.grid = StepGrid(rollout.steps, rollout.shift, family.process.t_end)
        self.step = 0

    def train_step(self) -> dict[str, float]:
        """One step; returns what is worth logging, of this process."""
        logs: dict[str, float] = {}
        for i in range(self.settings.guidance.ratio):
            logs |= self.update_fake_score(self.step * self.settings.guidance.ratio + i)
        logs |= self.update_generator()
        self.step += 1
        return logs

    def update_fake_score(self, update: int) -> dict[str, float]:
        losses = []
        for draws in self.micro_batches("fake_score", update):
            loss = self.fake_score_loss(draws)
            self.guidance.backward(loss)
            self.guidance.step()
            losses.append(loss.item())
        return {"loss/fake_score": sum(losses) / len(losses)}

    def update_generator(self) -> dict[str, float]:
        logs: list[Mapping[str, float]] = []
        for draws in self.micro_batches("generator", self.step):
            loss, values = self.generator_loss(draws)
            self.generator.backward(loss)
            self.generator.step()
            logs.append(values)
        return {name: sum(values[name] for values in logs) / len(logs) for name in logs[0]}

    def fake_score_loss(self, draws: Draws) -> Tensor:
        """Denoising on the generator's own samples: mean (F(x_τ) − target)²."""
        with torch.no_grad():
            sample = self.generate(draws)
        process, x0 = self.family.process, sample.x0
        tau = self.renoise.sample(len(x0), self.step, draws.each("renoise_time"), device=self.device)
        noise = randn(x0.shape, draws.each("renoise_noise"), device=self.device)
        t = process.time_at(tau)
        prediction = self.family.predict(
            self.guidance,
            process.add_noise(x0, noise, t),
            t,
            sample.condition,
            lora_scale=self.settings.guidance.fake_scale,
        )
        return denoising_loss(prediction, process.target(x0, noise, t))

    def generator_loss(self, draws: Draws) -> tuple[Tensor, dict[str, float]]:
        """Σ w_i · L_i over the objectives that have started, all on one sample."""
        sample = self.generate(draws)
        total = sample.x0.new_zeros(())
        logs: dict[str, float] = {}
        for objective in self.objectives:
            if self.step >= objective.start:
                loss, values = objective(sample)
                total = total + objective.weight * loss
                logs |= {f"loss/{objective.name}": loss.item(), **values}
        return total, logs

    def generate(self, draws: Draws) -> Sample:
        """The generator's x0 at a grid time drawn per sample, on the state that its own rollout visits there.

        Only the last prediction carries gradient.
        """
        prompts = self.prompts.draw(draws)
        condition = self.family.condition(prompts)
        noise = randn((len(prompts), *self.family.latent_shape), draws.each("noise"), device=self.device)
        chosen = self.choose_steps(draws).to(self.device)

        def predict(x: Tensor, time: Tensor) -> Tensor:
            return self.family.predict(self.generator, x, time, condition)

        mode = self.settings.rollout.mode
        with torch.no_grad():
            states = visit(predict, self.family.process, self.grid, noise, mode, draws.each("rollout"))
            # Every process walks equally far, as ZeRO-3 needs: to the last state of the grid.
            visited = list(states)
        x_t = torch.stack([x for x, _ in visited])[chosen, torch.arange(len(noise))]
        t = torch.stack([time for _, time in visited])[chosen, torch.arange(len(noise))]
        x0 = self.family.process.to_x0(x_t, predict(x_t, t), t)
        return Sample(x0, prompts, condition, draws, self.step)

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
