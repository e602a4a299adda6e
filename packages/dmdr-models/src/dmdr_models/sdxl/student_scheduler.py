"""The scheduler of diffusers that samples an SDXL student. Imports no torch until it is called."""

from collections.abc import Mapping
from typing import Any

from dmdr_models.sdxl.accepted import PROCESS

LCM: dict[str, Any] = {
    "original_inference_steps": 50,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}
"""The entries of an LCMScheduler that no student takes from its model: they would move its times or its steps."""
EULER: dict[str, Any] = {
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "timestep_spacing": "leading",  # the first step then starts at the process's own noise
    "timestep_type": "discrete",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "final_sigmas_type": "zero",
}
"""The same of an EulerDiscreteScheduler."""


def process_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a scheduler's config that describe its noise process; every scheduler of diffusers takes them."""
    return {"num_train_timesteps": 1000, **{name: config[name] for name in PROCESS if name in config}}


def student_scheduler(config: Mapping[str, Any], stochastic: bool) -> Any:
    """The scheduler with which a stock pipeline samples a student as it was trained, if it is called with its times.

    LCMScheduler renoises between steps, EulerDiscreteScheduler takes the deterministic ones. Of the model's own
    scheduler they take the noise process alone.

    Args:
        config: of the model's own scheduler.
    """
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    if stochastic:
        return LCMScheduler(**process_of(config), **LCM)
    return EulerDiscreteScheduler(**process_of(config), **EULER)
