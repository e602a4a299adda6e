"""Where noise is added for the two scores: to the generator's x0, or to the next state of its rollout.

`guidance.renoise_from` names the choice. Each says which point a sample is compared at, and what the fake score learns
there, so that both always belong together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from dmdr_core import (
    FlowMatching,
    Process,
    ancestral_step,
    denoising_loss,
    randn,
    renoise_state,
    sub_interval_loss,
)
from dmdr_core.base.devices import on_device
from torch import Tensor

from dmdr_train.base.errors import UserError
from dmdr_train.recipe import schema
from dmdr_train.training.sample import Sample

SHORT = 0.1
"""The longest step of the self-consistency, in time."""


@dataclass(frozen=True)
class Renoised:
    """A sample with fresh noise: the states `[B, C, H, W]`, their times `[B]`, and the noise."""

    x_t: Tensor
    t: Tensor
    noise: Tensor


Predict = Callable[[Renoised], Tensor]
"""The prediction of the fake score for the prompts of a sample."""


class Renoising(Protocol):
    """The interface of both choices."""

    def point(self, sample: Sample, fraction: Tensor) -> Renoised:
        """The sample with fresh noise, at fractions `[B]` of the way to noise; the same whenever it is called."""

    def loss(self, sample: Sample, at: Renoised, predict: Predict) -> Tensor:
        """What the fake score learns from at that point, a scalar."""


class FromX0:
    """Noise on the sample's x0, at any time: x_τ = (1 − τ) x0 + τ ε under flow matching."""

    def __init__(self, settings: schema.Guidance, process: Process):
        self.process = process

    def point(self, sample: Sample, fraction: Tensor) -> Renoised:
        return add_noise(self.process, sample, self.process.time_at(fraction), "renoise_noise")

    def loss(self, sample: Sample, at: Renoised, predict: Predict) -> Tensor:
        """Denoising of the generator's own samples, mean (F(x_τ) − target)²."""
        return denoising_loss(predict(at), self.process.target(sample.x0, at.noise, at.t))


class FromNextState:
    """Noise on the state x_s that the rollout goes to, at times τ from s on: sub-interval matching.

    x_τ = a x_s + σ ε, see `dmdr_core.sub_interval`. A sample at the last step of the rollout goes to its x0, at time 0.
    Source: AC-DMD, stage one of RTDMD, arXiv 2605.26108.

    Raises:
        UserError: the process is not flow matching.
    """

    def __init__(self, settings: schema.Guidance, process: Process):
        if not isinstance(process, FlowMatching):
            raise UserError(
                "guidance.renoise_from",
                f"next_state needs flow matching, and this is a {type(process).__name__}; use x0",
            )
        self.end = process.t_end
        self.consistency = settings.self_consistency

    def point(self, sample: Sample, fraction: Tensor) -> Renoised:
        s, x_s = self.start(sample), sample.next_state
        noise = randn(x_s.shape, sample.draws.each("renoise_noise"), device=x_s.device)
        t = s + (1 - s) * fraction
        return Renoised(renoise_state(x_s, noise, s, t), t, noise)

    def loss(self, sample: Sample, at: Renoised, predict: Predict) -> Tensor:
        """Denoising of the next states, `sub_interval_loss`, and the weighted self-consistency of the fake score."""
        prediction = predict(at)
        loss = sub_interval_loss(prediction, sample.next_state, at.noise, self.start(sample), at.t)
        if self.consistency == 0:
            return loss
        return loss + self.consistency * self.inconsistency(sample, at, prediction, predict)

    def inconsistency(self, sample: Sample, at: Renoised, prediction: Tensor, predict: Predict) -> Tensor:
        """mean (x̂0(x_τ) − sg x̂0(x_τ'))², with x_τ' one short ancestral step of the fake score away, τ' ≥ s.

        The fake score's x̂0 = x − τ F is a martingale along its reverse process, so its expectation at x_τ' is x̂0(x_τ).
        """
        x0 = clean(at, prediction)
        with torch.no_grad():
            drawn = [torch.rand((), generator=each) for each in sample.draws.each("consistency_time")]
            share = on_device(torch.stack(drawn), at.t.device)
            later = at.t - share * (at.t - self.start(sample)).clamp(max=SHORT)
            noise = randn(x0.shape, sample.draws.each("consistency_noise"), device=x0.device)
            there = Renoised(ancestral_step(at.x_t, x0.detach().to(at.x_t.dtype), noise, at.t, later), later, noise)
            target = clean(there, predict(there))
        return denoising_loss(x0, target)

    def start(self, sample: Sample) -> Tensor:
        """The times s of the next states, `[B]`; 0 for an x0."""
        return torch.where(sample.t_next <= self.end, 0.0, sample.t_next)


RENOISINGS: Mapping[str, type[FromX0] | type[FromNextState]] = {"x0": FromX0, "next_state": FromNextState}


def make_renoising(settings: schema.Guidance, process: Process) -> Renoising:
    """The renoising of a recipe.

    Raises:
        UserError: it does not go with the process.
    """
    return RENOISINGS[settings.renoise_from](settings, process)


def add_noise(process: Process, sample: Sample, t: Tensor, purpose: str) -> Renoised:
    """The sample's x0 with fresh noise at given times `[B]`; the same purpose always gives the same noise."""
    x0 = sample.x0.detach()
    noise = randn(x0.shape, sample.draws.each(purpose), device=x0.device)
    return Renoised(process.add_noise(x0, noise, t), t, noise)


def clean(at: Renoised, velocity: Tensor) -> Tensor:
    """x − τ v, in float32 or better."""
    return FlowMatching().to_x0(at.x_t, velocity, at.t)
