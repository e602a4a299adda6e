"""Which noise processes and decoders an SDXL folder may have. Imports no torch.

An SDXL predicts noise, at whole timesteps of a process with betas. diffusers has many schedulers that sample such a
process; their other entries say how a plain call samples, and none of them reaches a student (see
`dmdr_models.sdxl.student_scheduler`).
"""

from typing import Any

SCHEDULERS = (
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
    "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
"""The classes whose config describes a process with betas."""
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Those that the schedulers of students know."""
PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
"""The entries of a scheduler's config that describe the process."""
ONLY: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon",),
    "rescale_betas_zero_snr": (False,),  # a prediction of noise says nothing where there is nothing but noise
    "use_flow_sigmas": (False,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
}
"""The entries that would make it another process or another network, each with the values that it may have."""
FILE = "scheduler/scheduler_config.json"


def check_scheduler(config: dict[str, Any]) -> None:
    """Check that a scheduler's config describes the process of a network that predicts noise.

    Raises:
        ValueError: it is of another class or describes another process; names the first entry that does.
    """
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise ValueError(
            f"{FILE} is of the class {kind}, which has no betas: SDXL needs one like EulerDiscreteScheduler"
        )
    for name, valid in ONLY.items():
        if config.get(name, valid[0]) not in valid:
            raise ValueError(f"{FILE} has the {name} {config[name]}, only {valid[0]} is known")
    _check_betas(config)


def _check_betas(config: dict[str, Any]) -> None:
    missing = [name for name in ("beta_start", "beta_end", "beta_schedule") if name not in config]
    if missing:
        raise ValueError(f"{FILE} lacks {missing[0]}: save it again with the scheduler's save_pretrained")
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{FILE} has the num_train_timesteps {steps}, which is no count of timesteps")
    if betas is not None and (not isinstance(betas, list) or len(betas) != steps):
        raise ValueError(f"{FILE} has trained_betas that are not a list of num_train_timesteps {steps}")
    if betas is None and config["beta_schedule"] not in BETA_SCHEDULES:
        raise ValueError(
            f"{FILE} has the beta_schedule {config['beta_schedule']}, only {', '.join(BETA_SCHEDULES)} are known"
        )
    for beta in (config["beta_start"], config["beta_end"]) if betas is None else betas:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < 1:
            raise ValueError(f"{FILE} has the beta {beta}, which is not between 0 and 1")


def check_vae(config: dict[str, Any]) -> None:
    """Check that StableDiffusionXLPipeline decodes with a VAE as this package does.

    Raises:
        ValueError: the pipeline would leave out an entry of its config, or not take it.
    """
    if config.get("shift_factor"):
        raise ValueError(
            f"the VAE has the shift_factor {config['shift_factor']}, which StableDiffusionXLPipeline ignores"
        )
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None):
        raise ValueError(
            "the VAE has one of latents_mean and latents_std, not both: StableDiffusionXLPipeline ignores it"
        )
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if values is not None and (not isinstance(values, list) or len(values) != config.get("latent_channels")):
            raise ValueError(f"the VAE has {name} that are not a list with a number for each of its latent_channels")
