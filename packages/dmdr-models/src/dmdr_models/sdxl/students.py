"""How a stock pipeline is told to draw from an SDXL student as it was trained."""

from collections.abc import Mapping
from typing import Any


def snippet(names: str, opening: str, times: list[int], sampling: Mapping[str, Any]) -> str:
    """Python code that draws a picture from a student with diffusers alone, at the times where it was trained.

    Args:
        names, opening: what `dmdr_models.families.stock_students.opening` gives.
        times: at which the student is asked.
        sampling: `method` and `size`, as in its dmdr.json.
    """
    stochastic, size = sampling["method"] == "sde", sampling["size"]
    scheduler = "LCMScheduler" if stochastic else "EulerDiscreteScheduler"
    changed = "" if stochastic else ', timestep_spacing="leading", use_karras_sigmas=False'
    return f"""import torch
from diffusers import {scheduler}, {names}

{opening}pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{changed})
image = pipe(
    "a photo of a fox in the snow",
    num_inference_steps={len(times)},
    timesteps={times},
    guidance_scale=0,
    height={size},
    width={size},
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("fox.png")
"""
