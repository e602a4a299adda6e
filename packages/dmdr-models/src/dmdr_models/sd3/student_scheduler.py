"""The scheduler of diffusers that samples an SD3 student. Imports no torch until it is called."""

from typing import Any

RESET: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
}
"""The entries of a FlowMatchEulerDiscreteScheduler that no student takes from its model: they would move its times."""


def student_scheduler(shift: float, stochastic: bool) -> Any:
    """The scheduler with which a stock pipeline visits a student's trained times, if it is called with their sigmas.

    Args:
        shift: of the times towards noise.
        stochastic: renoise between steps.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic, **RESET)
