"""How a stock pipeline is told to draw from an SD3 student as it was trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import StableDiffusion3Pipeline

from dmdr_models.base.picture_size import as_size
from dmdr_models.families.original_layout import Place
from dmdr_models.families.stock_students import StockStudents, switching
from dmdr_models.sd3.original_layout import place
from dmdr_models.sd3.student_scheduler import student_scheduler
from dmdr_models.sd3.times import T_END


class SD3Students(StockStudents):
    """See `dmdr_models.families.stock_students.StockStudents`."""

    pipeline_class = StableDiffusion3Pipeline

    def save_scheduler(self, folder: Path, shift: float, stochastic: bool = False) -> None:
        student_scheduler(shift, stochastic).save_pretrained(folder / "scheduler")

    def place(self, layer: str) -> Place:
        return place(self.family.config, layer)

    def scheduler_class(self, sampling: Mapping[str, Any]) -> str:
        return "FlowMatchEulerDiscreteScheduler"

    def snippet(self, names: str, opening: str, sampling: Mapping[str, Any]) -> str:
        """See `StockStudents.snippet`.

        A plain call with as many steps would visit other times: it spreads them over the scheduler's own range.
        """
        stochastic = sampling["method"] == "sde"
        height, width = as_size(sampling["size"])
        # A pipeline hands its generator to no scheduler: the noise between steps would come from torch's global one.
        renoise = "pipe.scheduler.step = partial(pipe.scheduler.step, generator=generator)\n" if stochastic else ""
        return f"""{"from functools import partial" + 2 * chr(10) if stochastic else ""}import torch
from diffusers import {names}

{opening}generator = torch.Generator().manual_seed(0)
{renoise}image = pipe(
    "a photo of a fox in the snow",
    sigmas=torch.linspace(1, {T_END!r}, {sampling["steps"] + 1})[:-1].tolist(),  # as in training, before the shift
    guidance_scale=0,
    height={height},
    width={width},
    max_sequence_length={sampling["max_tokens"]},
    generator=generator,
{switching(sampling)}).images[0]
image.save("fox.png")
"""
