"""Which schedulers and decoders an SD3 folder may have. Imports no torch."""

from typing import Any


def check_scheduler(config: dict[str, Any]) -> None:
    """Check that a FlowMatchEulerDiscreteScheduler counts the timesteps as the networks do.

    Its other entries say how a plain call samples; none of them reaches a student (see
    `dmdr_models.sd3.student_scheduler`).

    Raises:
        ValueError: it counts them otherwise.
    """
    steps = config.get("num_train_timesteps", 1000)
    if steps != 1000:
        raise ValueError(f"scheduler/scheduler_config.json has the num_train_timesteps {steps}, only 1000 is known")


def check_vae(config: dict[str, Any]) -> None:
    """Check that StableDiffusion3Pipeline decodes with a VAE as this package does.

    Raises:
        ValueError: the pipeline would ignore an entry of its config, or fail without one.
    """
    for name in ("latents_mean", "latents_std"):
        if config.get(name) is not None:
            raise ValueError(f"the VAE has {name}, which StableDiffusion3Pipeline ignores")
    if config.get("_class_name") == "AutoencoderKL" and config.get("shift_factor") is None:
        raise ValueError("the VAE has no shift_factor, which StableDiffusion3Pipeline needs: write 0.0 into its config")
