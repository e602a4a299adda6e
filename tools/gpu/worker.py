"""The process that measures. It imports torch; the process that writes the table does not.

If a row ends this process (a crash, a device that no longer answers, too little memory), only this row is lost: the
other process starts a new one for the remaining rows.
"""

import gc
import importlib
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu.plan import FAILED, Result, Row, judged

if TYPE_CHECKING:
    from gpu.measure import Bench

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "open_clip_torch", "timm", "bitsandbytes")

LEFT_BEHIND = 2**30
"""Bytes on the GPU that a row may leave allocated; if it leaves more, the next row starts in a new process."""


@dataclass(frozen=True)
class Options:
    """Options of a check.

    Args:
        tiny: use tiny models.
        work: folder for the files of rows.
        emulated: use the emulated device.
    """

    tiny: bool
    work: Path
    emulated: bool = False


@dataclass(frozen=True)
class Mistake:
    """The reason why nothing can be measured here, as one line."""

    text: str


@dataclass(frozen=True)
class Answer:
    """A row's result, and whether this process can measure the next row."""

    result: Result
    sound: bool


def main(connection: Any, options: Options) -> None:
    """Send the environment over `connection`, then measure the rows that arrive, until None arrives."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the row that compares bits
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_CACHE", str(options.work / "datasets"))
    if options.tiny:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for such small tensors a second thread costs more than it gains
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.dup2(2, 1)  # keeps the output of libraries out of the table
    gc.disable()  # the objects of modules stay: collections would only look at them
    import torch

    if options.emulated:
        import emulated

        emulated.replace_gpu()
    elif not torch.cuda.is_available() and not options.tiny:
        connection.send(Mistake("no GPU here; --tiny rehearses on the CPU, with tiny models"))
        return
    from deepspeed.accelerator import get_accelerator

    from gpu import agreement, rewards, training  # noqa: F401  (imported before the first row is timed)
    from gpu.measure import Bench

    gc.freeze()
    gc.enable()
    device = torch.device(get_accelerator().device_name(), 0)
    device = torch.device("cpu") if device.type == "cpu" else device
    bench = Bench(device, options.tiny, options.work)
    connection.send({**environment(device), "matmul": bench.matmul(), "launch": bench.launch()})
    while (row := connection.recv()) is not None:
        connection.send(carry_out(row, bench))


def carry_out(row: Row, bench: "Bench") -> Answer:
    """Measure one row; any exception is a failure of the row."""
    module, _, name = row.function.partition(":")
    start = time.perf_counter()
    try:
        measured = getattr(importlib.import_module(module), name)(bench, **row.options)
        result = judged(row.name, measured, time.perf_counter() - start)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        result = Result(row.name, FAILED, text[:300], time.perf_counter() - start)
    return Answer(result, sound(bench))


def sound(bench: "Bench") -> bool:
    """Free memory; return whether the device still works and is empty enough for the next row."""
    import torch

    gc.collect()
    if not bench.cuda:
        return True
    try:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        works = torch.ones(2, device=bench.device).sum().item() == 2
        return works and torch.cuda.memory_allocated() < LEFT_BEHIND
    except Exception:
        return False


def environment(device: Any) -> dict[str, Any]:
    """Return what the numbers depend on: the card, its driver, versions."""
    import torch

    emulated = "" if device.type in ("cpu", "cuda") else "an emulated device on "
    found: dict[str, Any] = {"device": emulated + processor(), "python": platform.python_version()}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"device": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        found |= {"driver": driver(), "processor": processor()}
    found["versions"] = {name: installed(name) for name in PACKAGES}
    return found


def processor() -> str:
    """Return the CPU's name and number of cores, as far as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {len(os.sched_getaffinity(0))} cores"


def driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return answer[0] if answer else None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
