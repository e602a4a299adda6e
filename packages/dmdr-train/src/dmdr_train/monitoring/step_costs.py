"""What steps cost, as measured: seconds and memory, without the first steps, which warm up."""

import torch

WARM_UP, MEASURED = 3, 10
"""Steps that are left out, and the step after which the costs are told beside the plan."""


class StepCosts:
    """Measures the steps of this process from now on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps, self.seconds = 0, 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def add(self, seconds: float) -> None:
        """Count a step that took so many seconds."""
        self.steps += 1
        if self.steps > WARM_UP:
            self.seconds += seconds

    def values(self) -> dict[str, float]:
        """The mean seconds of a step after the warm-up and, on a GPU, the most memory that was allocated, in GiB."""
        found = {}
        if self.steps > WARM_UP:
            found["steady_seconds_per_step"] = self.seconds / (self.steps - WARM_UP)
        if self.device.type == "cuda":
            found["memory"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return found

    def line(self) -> str:
        """What was measured, once on a GPU after `MEASURED` steps; otherwise empty."""
        if self.steps != MEASURED or self.device.type != "cuda":
            return ""
        values = self.values()
        return f"measured: {values['memory']:.1f} GiB and {values['steady_seconds_per_step']:.3g} s per step"
