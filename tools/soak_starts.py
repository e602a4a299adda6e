"""Start a run in new processes: with a fork server, a launcher, or python alone."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from dmdr_train.checkpoint.manifest import RECIPE
from dmdr_train.tracking.metrics_file import METRICS

RUN = Path(__file__).parents[1] / "packages/dmdr-train/run.py"
OUT = "out"  # run.output of every run; each run has its own working folder, so files that contain this path are equal
GRACE = 30.0
"""Seconds that the other processes of a run have to end after the first: to name it, and to leave."""

SERVER = multiprocessing.get_context("forkserver")
IMPORTS = ["dmdr_train.run.runner", "matplotlib.pyplot", "torchmetrics.image.fid", "torchmetrics.image.inception"]
"""Modules that the server imports, besides the model's family."""


class Attempt(ABC):
    """One start of the run in the folder `run`.

    Args:
        log: a new file for the output of the processes.
    """

    def __init__(self, run: Path, log: Path):
        self.run, self.log, self.out = run, log, run / OUT
        self.log.touch()
        self.mark = self.log.stat().st_ctime
        self.outlived = False

    @abstractmethod
    def pids(self) -> list[int]:
        """Return the ids of the training processes that exist now."""

    @abstractmethod
    def codes(self) -> list[int | None]:
        """Return the exit codes: None for a running process, negative after a signal."""

    def over(self) -> bool:
        return None not in self.codes()

    def younger(self, path: Path) -> bool:
        """Return whether a path exists and has changed since the start, by the file system's clock."""
        try:
            return path.stat().st_ctime > self.mark
        except FileNotFoundError:
            return False

    def begun(self) -> bool:
        """Return whether the run has opened its folder; from then on it reports faults."""
        return self.younger(self.out / RECIPE)

    def logged(self) -> int:
        """Return the last step in the metrics."""
        path = self.out / METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait(self, until: Callable[[], bool]) -> bool:
        """Wait for `until`; return False if the run ended first."""
        while not until():
            if self.over():
                return False
            time.sleep(0.0005)
        return True

    def pause(self, seconds: float) -> bool:
        """Wait for some seconds; return False if the run ended first."""
        end = time.monotonic() + seconds
        return self.wait(lambda: time.monotonic() >= end)

    def send(self, number: signal.Signals, pids: Sequence[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> list[int | None]:
        """Wait for all processes; return their exit codes.

        Set `outlived` if some processes had to be killed long after the first ended.
        """
        self.wait(lambda: any(code is not None for code in self.codes()))
        self.outlived = self.pause(GRACE)
        if self.outlived:
            self.send(signal.SIGKILL, self.pids())
            self.wait(self.over)
        return self.codes()


class Forked(Attempt):
    """Processes of the fork server; they form a process group like the processes of a launcher."""

    def __init__(self, run: Path, log: Path, arguments: Sequence[str], processes: int):
        super().__init__(run, log)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **world, **meeting} for rank in range(processes)]
        self.processes = [
            SERVER.Process(target=_train, args=(run, log, arguments, rank), daemon=True) for rank in ranks
        ]
        for process in self.processes:
            process.start()

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid and process.exitcode is None]

    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]


def _train(run: Path, log: Path, arguments: Sequence[str], rank: dict[str, str]) -> None:
    """Do the same as run.py, in a process of the fork server."""
    from dmdr_train.cli import run_main

    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "the fork server has threads, which a fork would lose"
    multiprocessing.set_start_method(None, force=True)  # python's default
    os.chdir(run)
    os.environ.update(rank)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run_main(arguments)


class Launched(Attempt):
    """run.py, started as users start it. The exit codes are the launcher's."""

    def __init__(self, run: Path, log: Path, arguments: Sequence[str], processes: int, launcher: str):
        super().__init__(run, log)
        self.alone = launcher == "python"
        command = {
            "python": [sys.executable],
            "torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(processes)],
            "deepspeed": ["deepspeed", "--num_accelerators", str(processes)],
        }[launcher]
        with log.open("a") as file:
            self.launcher = subprocess.Popen([*command, str(RUN), *arguments], cwd=run, stdout=file, stderr=file)

    def pids(self) -> list[int]:
        """Return the processes that have a rank."""
        if self.alone:
            return [self.launcher.pid]
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.launcher.pid).children(recursive=True)
            return [child.pid for child in children if "LOCAL_RANK" in child.environ()]
        return []

    def codes(self) -> list[int | None]:
        return [self.launcher.poll()]
