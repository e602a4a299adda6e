"""How a stock pipeline is told to draw from an SDXL student as it was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline

from dmdr_models.base.picture_size import as_size
from dmdr_models.families.original_layout import Place
from dmdr_models.families.stock_students import StockStudents, switching
from dmdr_models.sdxl.original_layout import place
from dmdr_models.sdxl.student_scheduler import student_scheduler


class SDXLStudents(StockStudents):
    """See `dmdr_models.families.stock_students.StockStudents`."""

    pipeline_class = StableDiffusionXLPipeline

    def save_scheduler(self, folder: Path, shift: float, stochastic: bool = False) -> None:
        student_scheduler(self.family.scheduler_config, stochastic).save_pretrained(folder / "scheduler")

    def place(self, layer: str) -> Place:
        return place(self.family.config, layer)

    def scheduler_class(self, sampling: Mapping[str, Any]) -> str:
        return "LCMScheduler" if sampling["method"] == "sde" else "EulerDiscreteScheduler"

    def snippet(self, names: str, opening: str, sampling: Mapping[str, Any]) -> str:
        """See `StockStudents.snippet`."""
        times = self.family.grid(sampling["steps"]).times[:-1].tolist()
        height, width = as_size(sampling["size"])
        return f"""import torch
from diffusers import {names}

{opening}image = pipe(
    "a photo of a fox in the snow",
    num_inference_steps={len(times)},
    timesteps={times},
    guidance_scale=0,
    height={height},
    width={width},
    generator=torch.Generator().manual_seed(0),
{switching(sampling)}).images[0]
image.save("fox.png")
"""
