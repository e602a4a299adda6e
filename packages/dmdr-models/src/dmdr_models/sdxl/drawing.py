"""How `dmdr-generate` draws with diffusers' StableDiffusionXLPipeline. Imports no torch."""

import logging
from typing import Any

from dmdr_models.drawing.settings import Settings, UsageError

PIPELINE = "StableDiffusionXLPipeline"
DEFAULTS: dict[str, Any] = {"steps": 1, "method": "sde", "guidance": 0.0, "size": None, "times": "trained"}


def check(settings: Settings) -> None:
    """Refuse what SDXL alone knows to be wrong."""
    most = 50 if settings["method"] == "sde" else 500
    if settings["steps"] > most:
        raise UsageError(f"{settings.origin('steps')} is more than {settings['method']} takes: give at most {most}")


def said(scheduler: dict[str, Any]) -> dict[str, Any]:
    """The settings that a student's scheduler config tells."""
    return {"method": "sde" if scheduler.get("_class_name") == "LCMScheduler" else "euler"}


def student_scheduler(config: Any, stochastic: bool) -> Any:
    """The scheduler with which a stock pipeline samples a student as it was trained, if it is called with its times.

    LCMScheduler renoises between steps. EulerDiscreteScheduler takes the deterministic ones, and with the spacing
    "leading" it starts at the process's own noise.

    Args:
        config: of the model's own scheduler.
    """
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    if stochastic:
        return LCMScheduler.from_config(config)
    return EulerDiscreteScheduler.from_config(config, timestep_spacing="leading", use_karras_sigmas=False)


def prepare(pipeline: Any, generator: Any, *, steps: int, method: str, times: str) -> dict[str, Any]:
    """Give the pipeline its scheduler, and return what to call it with.

    Args:
        generator: the pipeline itself hands it to its scheduler.
        times: "trained" are those of `TimestepGrid(steps)`; "stock" those of a plain call, in which "euler" is the
            model's own scheduler.
    """
    from dmdr_core import TimestepGrid

    if method == "sde" or times == "trained":
        pipeline.register_modules(scheduler=student_scheduler(pipeline.scheduler.config, method == "sde"))
    if times == "stock":
        return {"num_inference_steps": steps}
    # It would warn that these are not the times of another method.
    logging.getLogger("diffusers.schedulers.scheduling_lcm").setLevel(logging.ERROR)
    count = pipeline.scheduler.config.num_train_timesteps
    return {"timesteps": TimestepGrid(steps, count).times[:-1].tolist()}
