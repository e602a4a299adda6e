"""The guide: teacher and fake score, two roles of one network, and the training of the fake score.

The network has a LoRA whose strength is chosen at every call. At scale s_f the network is the fake score, at scale 0
the teacher. In the dynamic phase of early training the teacher leans toward the fake score by a share of the LoRA
(DynaDG), and renoise times are drawn from a Beta distribution (DynaRS). Source: DMDR, arXiv 2511.13649.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from dmdr_core import BetaRenoise, UniformRenoise, cosine_anneal
from dmdr_models.drawing.sampling import both_predictions, guided_prediction
from dmdr_models.families.protocols import Condition, Family
from torch import Tensor

from dmdr_train.base.random_draws import Draws
from dmdr_train.recipe import schema
from dmdr_train.training.alignment import align
from dmdr_train.training.discriminator import Discriminator
from dmdr_train.training.renoising import Renoised, add_noise, make_renoising
from dmdr_train.training.sample import Sample

Sampler: TypeAlias = BetaRenoise | UniformRenoise


class Teacher:
    """The guidance network without its LoRA."""

    def __init__(self, network: Any):
        self.base = network

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.base(*inputs, lora_scale=0.0, **named)


class Guide:
    """Teacher and fake score. The predictions are x0, `[B, C, H, W]` in float32 or better, without gradient.

    Args:
        settings: the section `guidance` of a recipe.
        engine: engine (or module) of the guidance network, which is called with a `lora_scale`.
        start: the step at which the first objective begins to match distributions, where the dynamic phase begins.
        discriminator: for objectives that need one.
    """

    def __init__(
        self,
        settings: schema.Guidance,
        family: Family,
        engine: Any,
        start: int = 0,
        discriminator: Discriminator | None = None,
    ):
        self.settings = settings
        self.family = family
        self.engine = engine
        self.start = start
        self._discriminator = discriminator
        self.renoise_times = renoise_sampler(settings)
        self.renoising = make_renoising(settings, family.process)

    # -- predictions

    def renoise(self, sample: Sample, times: Sampler | None = None) -> Renoised:
        """The sample with fresh noise at a renoise time τ drawn per sample; see `dmdr_train.training.renoising`.

        Every call for one sample gives the same, so that all predictions of a step can be taken at one point.

        Args:
            times: the distribution of τ; by default the recipe's.
        """
        drawn = (times or self.renoise_times).sample(
            len(sample.x0), self.age(sample.step), sample.draws.each("renoise_time"), device=sample.x0.device
        )
        return self.renoising.point(sample, drawn)

    def add_noise(self, sample: Sample, t: Tensor, purpose: str) -> Renoised:
        """The sample's x0 with fresh noise at given times `[B]`; the same purpose always gives the same noise."""
        return add_noise(self.family.process, sample, t, purpose)

    @torch.no_grad()
    def fake(self, sample: Sample, at: Renoised) -> Tensor:
        """The fake score's x0."""
        return self._x0(at, self._fake_prediction(sample, at))

    @torch.no_grad()
    def conditional(self, sample: Sample, at: Renoised) -> Tensor:
        """The teacher's x0 for the sample's prompts."""
        return self._x0(at, self._predict(at, sample.condition, self.teacher_scale(sample.step)))

    @torch.no_grad()
    def unconditional(self, sample: Sample, at: Renoised) -> Tensor:
        """The teacher's x0 without a prompt."""
        null = self.family.null_condition(len(at.x_t))
        return self._x0(at, self._predict(at, null, self.teacher_scale(sample.step)))

    @torch.no_grad()
    def with_and_without_prompt(self, sample: Sample, at: Renoised) -> tuple[Tensor, Tensor]:
        """The teacher's x0 for the sample's prompts, and without a prompt, from one call for both."""
        strength = self.teacher_scale(sample.step)
        cond, uncond = both_predictions(self.family, self.engine, at.x_t, at.t, sample.condition, lora_scale=strength)
        return self._x0(at, cond), self._x0(at, uncond)

    @torch.no_grad()
    def real(self, sample: Sample, at: Renoised, cfg: float | None = None) -> Tensor:
        """The teacher's x0 under classifier-free guidance, from one call for both predictions.

        Args:
            cfg: the guidance scale w; by default the recipe's, with its jitter.
        """
        scale = self.cfg(sample.draws) if cfg is None else cfg
        strength = self.teacher_scale(sample.step)
        prediction = guided_prediction(
            self.family, self.engine, at.x_t, at.t, sample.condition, scale, lora_scale=strength
        )
        return self._x0(at, prediction)

    @torch.no_grad()
    def reference(self, sample: Sample) -> Tensor:
        """The x0 of the bare teacher at the states that the sample was predicted at."""
        prediction = self.family.predict(self.engine, sample.x_t, sample.t, sample.condition, lora_scale=0.0)
        return self.family.process.to_x0(sample.x_t, prediction, sample.t)

    # -- the discriminator

    @property
    def discriminator(self) -> Discriminator:
        """The discriminator; only for objectives that need one."""
        assert self._discriminator is not None
        return self._discriminator

    def logit(self, sample: Sample) -> Tensor:
        """The discriminator's logits `[B]` of the renoised sample; their gradients flow to the sample's x0."""
        t = self.head_times(sample)
        return self.discriminator.logit(self.discriminator.noisy(sample, t), t, sample.condition)

    @torch.no_grad()
    def log_ratio(self, sample: Sample, at: Renoised) -> Tensor:
        """log p(x_τ)/q(x_τ), `[B]`, of real samples and the generator's, as the discriminator estimates it."""
        return self.discriminator.logit(at.x_t, at.t, sample.condition)

    def learn_beside(self, sample: Sample, needs: Collection[str]) -> Mapping[str, Tensor]:
        """What the guide learns from a micro-batch of the generator's own update; returns values to log."""
        if "discriminator" not in needs:
            return {}
        return self.discriminator.learn(replace(sample, x0=sample.x0.detach()), self.head_times(sample))

    def head_times(self, sample: Sample) -> Tensor:
        """The times `[B]` at which the discriminator sees samples: by its own distribution, or those of the step."""
        own = self.discriminator.settings.renoise
        return self.renoise(sample, None if own is None else BetaRenoise(own.alpha, own.beta, math.inf)).t

    # -- training of the fake score

    def loss(self, sample: Sample) -> Tensor:
        """What the fake score learns from: denoising of the generator's own samples."""
        return self.renoising.loss(sample, self.renoise(sample), partial(self._fake_prediction, sample))

    def learn(self, sample: Sample) -> Tensor:
        """Train the fake score on a micro-batch of samples without gradient; returns the loss, without graph."""
        loss = self.loss(sample)
        self.engine.backward(loss * (1 + 0 * loss.detach()))  # an infinite loss poisons the update
        self.engine.step()
        return loss.detach()

    def after_update(self, generator: Any, step: int) -> None:
        """Follow the generator's update of a step. All processes must call this together.

        The fake score moves toward the generator if the recipe has an alignment and distributions are matched, and the
        discriminator takes the step that it has learned.
        """
        if self._discriminator is not None:
            self._discriminator.update()
        alignment = self.settings.alignment
        if alignment is not None and self.age(step) >= 0:
            align(self.engine, generator, alignment.decay, self.settings.fake_scale)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides the engine: the discriminator's state; empty without one."""
        return {} if self._discriminator is None else self._discriminator.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            KeyError, RuntimeError: it is that of another discriminator.
        """
        if self._discriminator is not None:
            self._discriminator.load_state_dict(state)

    # -- what changes from step to step

    def teacher_scale(self, step: int) -> float:
        """The LoRA scale of the teacher, s_r: 0 after the dynamic phase."""
        dynamics = self.settings.dynamics
        return cosine_anneal(dynamics.teacher_scale, 0.0, self.age(step), dynamics.steps) if dynamics else 0.0

    def age(self, step: int) -> int:
        """The number of steps since distributions began to be matched, which the dynamic phase counts."""
        return step - self.start

    def cfg(self, draws: Draws) -> float:
        """The teacher's guidance scale w of an update, the same on every process."""
        if not self.settings.cfg_jitter:
            return self.settings.cfg
        shift = 2 * torch.rand((), generator=draws.shared("cfg")).item() - 1
        return self.settings.cfg + self.settings.cfg_jitter * shift

    def _fake_prediction(self, sample: Sample, at: Renoised) -> Tensor:
        return self._predict(at, sample.condition, self.settings.fake_scale)

    def _predict(self, at: Renoised, condition: Condition, scale: float) -> Tensor:
        return self.family.predict(self.engine, at.x_t, at.t, condition, lora_scale=scale)

    def _x0(self, at: Renoised, prediction: Tensor) -> Tensor:
        return self.family.process.to_x0(at.x_t, prediction, at.t)


def renoise_sampler(guidance: schema.Guidance) -> Sampler:
    """The distribution of renoise times, for all objectives and for the fake score alike (DynaRS)."""
    dynamics = guidance.dynamics
    if dynamics is None or dynamics.renoise is None:
        return UniformRenoise()
    return BetaRenoise(dynamics.renoise.alpha, dynamics.renoise.beta, dynamics.steps)
