"""Sampling latents from a network: many steps with guidance (a teacher), few steps without (a student)."""

from typing import Any

import torch
from dmdr_core import FlowMatching, Grid, guided, rollout
from torch import Tensor

from dmdr_models.families.protocols import Condition, Family

METHODS = ("euler", "heun", "sde")


def guided_prediction(
    family: Family, network: Any, x_t: Tensor, t: Tensor, condition: Condition, scale: float, **named: Any
) -> Tensor:
    """uncond + scale · (cond − uncond), both in one call of the network.

    Scale 1 is no guidance: only the conditional prediction is computed. Source: "Classifier-Free Diffusion Guidance",
    arXiv 2207.12598.
    """
    if scale == 1.0:
        return family.predict(network, x_t, t, condition, **named)
    return guided(*both_predictions(family, network, x_t, t, condition, **named), scale)


def both_predictions(
    family: Family, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any
) -> tuple[Tensor, Tensor]:
    """The predictions for a condition and without one, from one call of the network."""
    null = family.null_condition(len(x_t))
    both = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
    cond, uncond = family.predict(network, torch.cat([x_t, x_t]), torch.cat([t, t]), both, **named).chunk(2)
    return cond, uncond


@torch.no_grad()
def sample(
    family: Family,
    network: Any,
    condition: Condition,
    noise: Tensor,
    num_steps: int,
    method: str = "euler",
    guidance: float = 1.0,
    shift: float = 1.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Latents `[B, C, H, W]` from `noise` of the same shape.

    Args:
        num_steps: steps on `family.grid(num_steps, shift)`; "heun" calls the network twice in each but the last.
        method: "euler" takes the deterministic step of the process, which for a variance-preserving process is DDIM's;
            "heun" needs flow matching; "sde" renoises between steps, as few-step students are trained to.
        guidance: classifier-free guidance scale, 1 for none.
        generator: of the noise of "sde".

    Raises:
        ValueError: an unknown method, "heun" on a process other than flow matching, or a shift that the family does
            not know.
    """
    if method not in METHODS:
        raise ValueError(f"unknown sampling method {method!r}; valid are {', '.join(METHODS)}")

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return guided_prediction(family, network, x_t, t, condition, guidance)

    grid = family.grid(num_steps, shift)
    if method == "heun":
        return _heun(predict, family.process, grid, noise)
    mode = "sde" if method == "sde" else "ode"
    return rollout(predict, family.process, grid, noise, mode=mode, generator=generator).x0


def _heun(predict: Any, process: Any, grid: Grid, noise: Tensor) -> Tensor:
    """Second-order: the mean of the velocities at both ends of a step; Euler for the last step."""
    if not isinstance(process, FlowMatching):
        raise ValueError("the heun sampler needs a flow-matching model; use euler")
    x = noise
    times = grid.times.to(noise.device)
    for i in range(len(times) - 1):
        here, there = times[i].expand(len(x)), times[i + 1].expand(len(x))
        v = predict(x, here)
        if i + 2 < len(times):
            v = (v + predict(process.step(x, v, here, there), there)) / 2
        x = process.step(x, v, here, there)
    return x
