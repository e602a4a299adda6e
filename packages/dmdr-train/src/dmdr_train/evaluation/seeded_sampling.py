"""Samples that depend on seed, prompt and index alone, so that networks are compared on the same noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dmdr_core import randn
from dmdr_models.drawing.sampling import sample
from dmdr_models.families.protocols import Family
from torch import Tensor

from dmdr_train.base.random_draws import named_generator
from dmdr_train.recipe.schema import Recipe


@dataclass(frozen=True)
class SamplingPlan:
    """How a network is sampled; see `dmdr_models.drawing.sampling.sample`.

    Args:
        steps: of the time grid.
        method: "euler", "heun" or "sde".
        guidance: scale of classifier-free guidance; 1 is none.
        shift: of the time grid.
    """

    steps: int
    method: str
    guidance: float = 1.0
    shift: float = 1.0


def student_plan(settings: Recipe) -> SamplingPlan:
    """The student is sampled as it is trained, without guidance; with `cps`, by the deterministic step.

    The states of `cps` have the amounts of signal and noise of the deterministic rollout's.
    """
    method = {"sde": "sde", "ode": "euler", "cps": "euler"}[settings.rollout.mode]
    return SamplingPlan(settings.rollout.steps, method, shift=settings.rollout.shift)


def teacher_plan(settings: Recipe, steps: int) -> SamplingPlan:
    """The teacher is sampled by Euler's method, with its own guidance."""
    return SamplingPlan(steps, "euler", settings.guidance.drawing_cfg, settings.rollout.shift)


def teacher_name(settings: Recipe, steps: int) -> str:
    """What a row of the teacher is called; it says a guidance that is not that of the training."""
    guidance = settings.guidance
    own = "" if guidance.drawing_cfg == guidance.cfg else f", guidance {guidance.drawing_cfg:g}"
    return f"teacher, {counted(steps)}{own}"


def counted(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


@torch.no_grad()
def draw_latents(
    family: Family,
    network: Any,
    plan: SamplingPlan,
    prompts: Sequence[Any],
    seed: int,
    indices: Sequence[int],
    device: torch.device,
    noise: str = "noise",
) -> Tensor:
    """Draw a batch of samples, latents `[B, C, H, W]`. A sample does not depend on the rest of its batch.

    Args:
        prompts: one per sample.
        indices: one per sample; every index has generators of its own, for the first noise and for that of "sde".
        noise: the name of the generators of the first noise.
    """
    first = [named_generator(seed, noise, i) for i in indices]
    fresh = [named_generator(seed, "rollout", i) for i in indices]
    return sample(
        family,
        network,
        family.condition(list(prompts)),
        randn((len(indices), *family.latent_shape(*family.size)), first, device=device),
        plan.steps,
        plan.method,
        plan.guidance,
        plan.shift,
        fresh,
    )
