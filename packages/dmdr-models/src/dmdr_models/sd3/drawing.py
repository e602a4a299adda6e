"""How `dmdr-generate` draws with diffusers' StableDiffusion3Pipeline. Imports no torch."""

from functools import partial
from typing import Any

from dmdr_models.drawing.settings import Settings, UsageError
from dmdr_models.folder.contents import MAX_TOKENS
from dmdr_models.sd3.times import T_END

PIPELINE = "StableDiffusion3Pipeline"
DEFAULTS: dict[str, Any] = {
    "steps": 4,
    "method": "euler",
    "guidance": 0.0,
    "shift": None,
    "size": None,
    "max_tokens": MAX_TOKENS["sd3"],
    "times": "trained",
}


def check(settings: Settings) -> None:
    """Refuse what SD3 alone knows to be wrong."""
    if settings["shift"] is not None:
        settings.check_positive("shift", "1 for no shift")
    settings.check_count("max_tokens")
    if settings["max_tokens"] > 512:
        raise UsageError(f"{settings.origin('max_tokens')} is more than the pipeline takes: give at most 512")


def said(scheduler: dict[str, Any]) -> dict[str, Any]:
    """The settings that a student's scheduler config tells."""
    found = {"method": "sde" if scheduler.get("stochastic_sampling") else "euler"}
    return found | ({"shift": scheduler["shift"]} if "shift" in scheduler else {})


def prepare(
    pipeline: Any, generator: Any, *, steps: int, method: str, shift: float | None, max_tokens: int, times: str
) -> dict[str, Any]:
    """Give the pipeline its scheduler, and return what to call it with.

    Args:
        generator: of the noise between the steps of "sde".
        shift: of the times towards noise (default: the pipeline's own).
        times: "trained" are those of `StepGrid(steps, shift, t_end=0.001)`; "stock" those of a plain call.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    changed = {"stochastic_sampling": method == "sde", **({} if shift is None else {"shift": shift})}
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changed)
    scheduler.step = partial(scheduler.step, generator=generator)  # the pipeline hands it none
    pipeline.register_modules(scheduler=scheduler)
    if times == "trained":
        return {"sigmas": torch.linspace(1, T_END, steps + 1)[:-1].tolist(), "max_sequence_length": max_tokens}
    return {"num_inference_steps": steps, "max_sequence_length": max_tokens}
