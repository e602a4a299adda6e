"""Measure the time, memory, operations and waits of a step."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from gpu.plan import Measured

GIB = 2**30
WAITED = "called a synchronizing CUDA operation"
PROTOTYPE = "Synchronization debug mode is a prototype"
"""Texts of torch's warnings in its sync-debug mode: for a wait, and when the mode is switched on."""


@dataclass(frozen=True)
class Bench:
    """The environment in which rows are measured.

    Args:
        tiny: use tiny models, for a rehearsal.
        work: folder for the files of all rows.
    """

    device: torch.device
    tiny: bool
    work: Path

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.cuda:
            torch.cuda.synchronize()

    def measure(self, step: Callable[[], Mapping[str, float | Tensor]], batch: int) -> Measured:
        """Count the operations of a warm-up step, then time two steps, or up to five within two seconds at full size.

        Args:
            step: returns numbers that must be finite.
        """
        with FlopCounterMode(display=False) as counter:
            step()
        self.wait()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds: list[float] = []
        with observed(self.device) as (places, warned):
            while len(seconds) < 2 or (sum(seconds) < 2 and len(seconds) < 5 and not self.tiny):
                start = time.perf_counter()
                logs = step()
                self.wait()
                seconds.append(time.perf_counter() - start)
        numbers = {name: float(value) for name, value in logs.items()}
        found = Measured(batch, statistics.median(seconds), numbers=numbers)
        found.more = {"seconds": seconds, "warnings": warned}
        found.flops = float(counter.get_total_flops())
        if self.cuda:
            found.peak = torch.cuda.max_memory_allocated() / GIB
        if not self.cpu:
            found.waits = places.total() / len(seconds)
            found.more["waits"] = dict(places.most_common())
        return found

    def kernels(self, step: Callable[[], object]) -> tuple[int, float] | None:
        """Take a step; return how many kernels and copies the GPU executed, and their seconds, by torch's profiler.

        None without CUDA. Divide by the seconds of a step without the profiler, which slows the CPU: far below 1, the
        GPU waits for the CPU, which launches kernels more slowly than the GPU executes them.
        """
        if not self.cuda:
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            self.wait()
        events = profiler.profiler.kineto_results.events()  # `key_averages` is slow for 100,000 events
        executed = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
        return len(executed), sum(event.duration_ns() for event in executed) / 1e9

    def launch(self) -> float:
        """Return the seconds in which the CPU launches a small kernel, with eager torch."""
        count = 2000 if self.cuda else 20
        x = torch.zeros(1, device=self.device)
        x.add_(1)
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            x.add_(1)
        seconds = time.perf_counter() - start
        self.wait()
        return seconds / count

    def matmul(self) -> float:
        """Return the operations per second of a product of random bf16 matrices, 8192³; 256³ without CUDA."""
        side, count = (8192, 20) if self.cuda else (256, 2)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        a @ b
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        self.wait()
        return count * 2 * side**3 / (time.perf_counter() - start)


@contextmanager
def observed(device: torch.device) -> Iterator[tuple[Counter[str], list[str]]]:
    """Count the operations that wait for the device, by line of Python code, and collect warnings.

    Explicit waits, such as `torch.cuda.synchronize`, are not counted. The emulated device counts by operation.

    Yields:
        The counts, and the first lines of all other warnings; both are filled at the end of the context.
    """
    places: Counter[str] = Counter()
    warned: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        elif device.type != "cpu":
            import emulated

            emulated.waits.clear()
        try:
            yield places, warned
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            elif device.type != "cpu":
                places.update(emulated.waits)
    for warning in caught:
        text = str(warning.message).splitlines()[0]
        if WAITED in text:
            places[f"{short(warning.filename)}:{warning.lineno}"] += 1
        elif PROTOTYPE not in text and text not in warned:
            warned.append(text)


def short(file: str) -> str:
    """Return the last two parts of a path."""
    return "/".join(Path(file).parts[-2:])
