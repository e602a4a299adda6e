"""How a stock pipeline is told to draw from an SDXL student as it was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline

from dmdr_models.families.stock_students import StockStudents
from dmdr_models.sdxl.student_scheduler import student_scheduler


class SDXLStudents(StockStudents):
    """See `dmdr_models.families.stock_students.StockStudents`."""

    pipeline_class = StableDiffusionXLPipeline

    def save_scheduler(self, folder: Path, shift: float, stochastic: bool = False) -> None:
        student_scheduler(self.family.scheduler_config, stochastic).save_pretrained(folder / "scheduler")

    def snippet(self, names: str, opening: str, sampling: Mapping[str, Any]) -> str:
        """See `StockStudents.snippet`."""
        times = self.family.grid(sampling["steps"]).times[:-1].tolist()
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
