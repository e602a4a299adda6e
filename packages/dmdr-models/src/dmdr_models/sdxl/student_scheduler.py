"""The scheduler of diffusers that samples an SDXL student. Imports no torch until it is called."""

from typing import Any


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
