"""How `dmdr-generate` draws with diffusers' StableDiffusionXLPipeline. Imports no torch until it draws."""

import logging
from typing import Any

from dmdr_models.base.errors import UsageError
from dmdr_models.drawing.settings import Settings
from dmdr_models.drawing.stock_pipeline import StockPipeline
from dmdr_models.sdxl.student_scheduler import student_scheduler


class SDXLDrawing(StockPipeline):
    """See `dmdr_models.drawing.stock_pipeline.StockPipeline`."""

    pipeline = "StableDiffusionXLPipeline"
    defaults = {"steps": 1, "method": "sde", "guidance": 0.0, "size": None, "times": "trained"}  # noqa: RUF012

    def check(self, settings: Settings) -> None:
        most = 50 if settings["method"] == "sde" else 500
        if settings["steps"] > most:
            raise UsageError(f"{settings.origin('steps')} is more than {settings['method']} takes: give at most {most}")

    def said(self, scheduler: dict[str, Any]) -> dict[str, Any]:
        return {"method": "sde" if scheduler.get("_class_name") == "LCMScheduler" else "euler"}

    def prepare(self, pipeline: Any, generator: Any, **sampling: Any) -> dict[str, Any]:
        """See `StockPipeline.prepare`; the pipeline itself hands `generator` to its scheduler.

        Args:
            sampling: `steps`, `method`; `times`, "trained" for those of `TimestepGrid(steps)` or "stock" for those of
                a plain call, in which "euler" is the model's own scheduler.
        """
        from dmdr_core import TimestepGrid

        steps, method, times = sampling["steps"], sampling["method"], sampling["times"]
        if method == "sde" or times == "trained":
            pipeline.register_modules(scheduler=student_scheduler(pipeline.scheduler.config, method == "sde"))
        if times == "stock":
            return {"num_inference_steps": steps}
        # It would warn that these are not the times of another method.
        logging.getLogger("diffusers.schedulers.scheduling_lcm").setLevel(logging.ERROR)
        count = pipeline.scheduler.config.num_train_timesteps
        return {"timesteps": TimestepGrid(steps, count).times[:-1].tolist()}
