"""The terms of the generator's loss. Each is an object with a weight of its own, and knows nothing of the others.

An objective is called with what the generator made and returns its unweighted loss and what is worth logging. The
trainer asks it for the gradient at x0 alone; only the sum of these goes on into the network.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from dmdr_core import BetaRenoise, UniformRenoise, cosine_anneal, denoising_loss, dmd_loss, hinge, randn
from dmdr_models.drawing.sampling import guided_prediction
from dmdr_models.families.protocols import Condition, Family
from torch import Tensor

from dmdr_train.base.random_draws import Draws
from dmdr_train.objectives.guarded_scores import asked
from dmdr_train.objectives.loss_weight import Weight
from dmdr_train.recipe import schema


@dataclass(frozen=True)
class Sample:
    """What the generator made: x0 `[B, C, H, W]` with gradient, for these prompts, at this step.

    Where it started from a pair, `target` is the teacher's x0.
    """

    x0: Tensor
    prompts: list[Any]
    condition: Condition
    draws: Draws
    step: int
    decode: Callable[["Sample"], Tensor]
    target: Tensor | None = None

    @cached_property
    def pictures(self) -> Tensor:
        """What rewards see, `[B, 3, H', W']` in [0, 1] with gradient; decoded once for all objectives."""
        return self.decode(self)


class Objective(Protocol):
    name: str
    weight: Weight

    def __call__(self, sample: Sample) -> tuple[Tensor, Mapping[str, float]]:
        """The unweighted loss, and values to log."""


def renoise_sampler(guidance: schema.Guidance) -> BetaRenoise | UniformRenoise:
    """Dynamic renoise sampling (DynaRS), for the distribution-matching term and for the fake score alike."""
    dynamics = guidance.dynamics
    if dynamics is None or dynamics.renoise is None:
        return UniformRenoise()
    return BetaRenoise(dynamics.renoise.alpha, dynamics.renoise.beta, dynamics.steps)


class DistributionMatching:
    """½ · mean (x0 − sg(x0 − g))², with g the normalised difference of the fake score's and the teacher's x0.

    Both are asked at the same renoised x_τ, without gradient. Early on the teacher leans toward the fake score by a
    share of its LoRA (DynaDG). Source: DMDR, arXiv 2511.13649.
    """

    name = "distribution_matching"

    def __init__(self, settings: schema.DistributionMatching, guidance: schema.Guidance, family: Family, network: Any):
        self.weight = Weight(settings)
        self.guidance = guidance
        self.family = family
        self.network = network
        self.renoise = renoise_sampler(guidance)

    def __call__(self, sample: Sample) -> tuple[Tensor, Mapping[str, float]]:
        process, scale = self.family.process, self.teacher_scale(sample.step)
        with torch.no_grad():
            x_t, t, _ = self.renoised(sample)
            fake = self.family.predict(self.network, x_t, t, sample.condition, lora_scale=self.guidance.fake_scale)
            real = guided_prediction(
                self.family, self.network, x_t, t, sample.condition, self.cfg(sample.draws), lora_scale=scale
            )
            x0_fake, x0_real = process.to_x0(x_t, fake, t), process.to_x0(x_t, real, t)
        silenced = (x0_real.isnan() | x0_fake.isnan()).flatten(1).any(dim=1).float().mean().item()
        return dmd_loss(sample.x0, x0_real, x0_fake), {"teacher_scale": scale, f"silenced/{self.name}": silenced}

    def fake_score_loss(self, sample: Sample) -> Tensor:
        """What the fake score learns from: denoising of the generator's own samples, mean (F(x_τ) − target)²."""
        x_t, t, noise = self.renoised(sample)
        scale = self.guidance.fake_scale
        prediction = self.family.predict(self.network, x_t, t, sample.condition, lora_scale=scale)
        return denoising_loss(prediction, self.family.process.target(sample.x0, noise, t))

    def renoised(self, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """x_τ, its times `[B]` and its fresh noise."""
        x0, draws, process = sample.x0, sample.draws, self.family.process
        tau = self.renoise.sample(len(x0), self.age(sample.step), draws.each("renoise_time"), device=x0.device)
        noise = randn(x0.shape, draws.each("renoise_noise"), device=x0.device)
        t = process.time_at(tau)
        return process.add_noise(x0, noise, t), t, noise

    def teacher_scale(self, step: int) -> float:
        dynamics = self.guidance.dynamics
        return cosine_anneal(dynamics.teacher_scale, 0.0, self.age(step), dynamics.steps) if dynamics else 0.0

    def age(self, step: int) -> int:
        """The steps that it has been at work for, which the dynamic phase counts."""
        return step - self.weight.settings.start

    def cfg(self, draws: Draws) -> float:
        if not self.guidance.cfg_jitter:
            return self.guidance.cfg
        shift = 2 * torch.rand((), generator=draws.shared("cfg")).item() - 1
        return self.guidance.cfg + self.guidance.cfg_jitter * shift


class Regression:
    """mean (x0 − target)², with the target what the teacher made of the same noise, along its whole trajectory.

    A start for one step, where the teacher's own single step is no picture yet. Source: DMD2, arXiv 2405.14867.
    """

    name = "regression"

    def __init__(self, settings: schema.Regression):
        self.weight = Weight(settings)

    def __call__(self, sample: Sample) -> tuple[Tensor, Mapping[str, float]]:
        assert sample.target is not None
        return denoising_loss(sample.x0, sample.target), {}


class RewardTerm(ABC):
    """mean relu(margin − r), with r a differentiable score of the decoded pictures.

    Pictures that the reward leaves without a score, and says so by its `skipped`, are left out of the mean; without any
    score the term is 0. Where the reward fails, `failure` says why, and the loss is NaN, so that no process makes this
    update.

    Args:
        reward: the model that scores.
    """

    failure = ""

    def __init__(self, settings: schema.RewardObjective, reward: Any, name: str):
        self.name = name
        self.weight = Weight(settings)
        self.margin = settings.margin
        self.scorer = self.reward = reward

    @abstractmethod
    def score(self, pictures: Tensor, prompts: Sequence[Any], draws: Draws) -> Tensor:
        """r of pictures `[B, 3, H, W]` in [0, 1], `[B]`."""

    def __call__(self, sample: Sample) -> tuple[Tensor, Mapping[str, float]]:
        before, pictures = getattr(self.scorer, "skipped", None), sample.pictures.view_as(sample.pictures)
        score, failure = asked(lambda: self.score(pictures, sample.prompts, sample.draws), pictures)
        if failure:
            self.failure = f"{self.scorer.info.name} of the objective {self.name}: {failure}"
        values = {}
        if before is not None:
            scored = ~score.isnan() if self.scorer.skipped > before else torch.ones_like(score, dtype=torch.bool)
            if pictures.requires_grad:  # nothing may come back through a score that is none
                pictures.register_hook(lambda slope: slope.masked_fill(~scored.reshape(-1, 1, 1, 1), 0.0))
            values[f"unscored/{self.name}"] = 1 - scored.float().mean().item()
            score = score[scored]
        values[f"reward/{self.reward.info.name}"] = score.detach().mean().item()
        values[f"past_margin/{self.name}"] = (score > self.margin).float().mean().item()
        return self.loss(score), values

    def loss(self, score: Tensor) -> Tensor:
        """mean relu(margin − r) over `[n]` scores; 0 of none, and NaN where one is no number."""
        if len(score) == 0:
            return score.sum()
        return hinge(score, self.margin).mean() if bool(score.isfinite().all()) else score.sum() * float("nan")


class ReFL(RewardTerm):
    """r is the reward itself, of the prompt in its template. Source: ReFL, arXiv 2304.05977."""

    def __init__(self, settings: schema.ReFL, reward: Any, name: str = "refl"):
        super().__init__(settings, reward, name)
        self.template = settings.template

    def score(self, pictures: Tensor, prompts: Sequence[Any], draws: Draws) -> Tensor:
        return self.reward.score(pictures, [self.read(prompt) for prompt in prompts])

    def read(self, prompt: Any) -> Any:
        """What the reward reads in place of a prompt; class labels stay as they are."""
        return self.template.replace("{prompt}", prompt) if isinstance(prompt, str) else prompt


class SRPO(RewardTerm):
    """r is the relative reward (1 + k) · reward(positive) − reward(negative).

    The prompt is led by an adjective of each kind, the same for a whole update. Source: SRPO, arXiv 2509.06942.
    """

    def __init__(self, settings: schema.SRPO, reward: Any, name: str = "srpo"):
        from dmdr_rewards import Relative

        super().__init__(settings, reward, name)
        draws_come_with_the_sample = torch.Generator()
        self.reward = Relative(
            reward, settings.positive, settings.negative, settings.k, settings.template, draws_come_with_the_sample
        )

    def score(self, pictures: Tensor, prompts: Sequence[Any], draws: Draws) -> Tensor:
        self.reward.generator = draws.shared("adjectives")
        return self.reward.score(pictures, prompts)
