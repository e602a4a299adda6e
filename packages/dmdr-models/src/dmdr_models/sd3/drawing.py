"""How `dmdr-generate` draws with diffusers' StableDiffusion3Pipeline. Imports no torch until it draws."""

from functools import partial
from typing import Any

from dmdr_models.base.errors import UsageError
from dmdr_models.drawing.settings import Settings
from dmdr_models.drawing.stock_pipeline import StockPipeline
from dmdr_models.sd3.layout import MAX_TOKENS
from dmdr_models.sd3.student_scheduler import student_scheduler
from dmdr_models.sd3.times import T_END


class SD3Drawing(StockPipeline):
    """See `dmdr_models.drawing.stock_pipeline.StockPipeline`."""

    pipeline = "StableDiffusion3Pipeline"
    defaults = {  # noqa: RUF012
        "steps": 4,
        "method": "euler",
        "guidance": 0.0,
        "shift": None,
        "size": None,
        "max_tokens": MAX_TOKENS,
        "times": "trained",
    }

    def check(self, settings: Settings) -> None:
        if settings["shift"] is not None:
            settings.check_positive("shift", "1 for no shift")
        settings.check_count("max_tokens")
        if settings["max_tokens"] > 512:
            raise UsageError(f"{settings.origin('max_tokens')} is more than the pipeline takes: give at most 512")

    def said(self, scheduler: dict[str, Any]) -> dict[str, Any]:
        found = {"method": "sde" if scheduler.get("stochastic_sampling") else "euler"}
        return found | ({"shift": scheduler["shift"]} if "shift" in scheduler else {})

    def prepare(self, pipeline: Any, generator: Any, **sampling: Any) -> dict[str, Any]:
        """See `StockPipeline.prepare`.

        Args:
            sampling: `steps`, `method`, `max_tokens`; `shift` of the times towards noise, None for the pipeline's own;
                `times`, "trained" for those of `StepGrid(steps, shift, t_end=0.001)` or "stock" for those of a plain
                call.
        """
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler

        steps, shift, length = sampling["steps"], sampling["shift"], sampling["max_tokens"]
        shift = pipeline.scheduler.config.shift if shift is None else shift
        scheduler = student_scheduler(shift, sampling["method"] == "sde")
        if sampling["times"] == "stock":
            changed = {"shift": shift, "stochastic_sampling": sampling["method"] == "sde"}
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changed)
        scheduler.step = partial(scheduler.step, generator=generator)  # the pipeline hands it none
        pipeline.register_modules(scheduler=scheduler)
        if sampling["times"] == "trained":
            return {"sigmas": torch.linspace(1, T_END, steps + 1)[:-1].tolist(), "max_sequence_length": length}
        return {"num_inference_steps": steps, "max_sequence_length": length}
