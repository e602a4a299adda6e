"""One start of a run in processes of their own: from a fork server, by a launcher, or by python alone."""

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
from dmdr_train.tracking.trackers import METRICS

RUN = Path(__file__).parents[1] / "packages/dmdr-train/run.py"
OUT = "out"  # run.output of every run, each in a folder of its own, so that the files that name it are the same
GRACE = 30.0
"""Seconds that the processes of a run have to end after the first of them: to name it, and to go."""

SERVER = multiprocessing.get_context("forkserver")
IMPORTS = ["dmdr_train.run.runner", "matplotlib.pyplot", "torchmetrics.image.fid", "torchmetrics.image.inception"]
"""What its processes would import first, besides the model's family."""


class Attempt(ABC):
    """One start of the run in the folder `run`.

    Args:
        log: a new file for what the processes say.
    """

    def __init__(self, run: Path, log: Path):
        self.run, self.log, self.out = run, log, run / OUT
        self.log.touch()
        self.mark = self.log.stat().st_ctime
        self.outlived = False

    @abstractmethod
    def pids(self) -> list[int]:
        """The processes that train, as far as they are there."""

    @abstractmethod
    def codes(self) -> list[int | None]:
        """Exit codes, None for what is not over; negative ones are signals."""

    def over(self) -> bool:
        return None not in self.codes()

    def younger(self, path: Path) -> bool:
        """Whether something is there and has changed since the start, by the file system's own clock."""
        try:
            return path.stat().st_ctime > self.mark
        except FileNotFoundError:
            return False

    def begun(self) -> bool:
        """Whether the run has opened its folder: from here on it says what happens to it."""
        return self.younger(self.out / RECIPE)

    def logged(self) -> int:
        """The last step in the metrics."""
        path = self.out / METRICS
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def wait(self, until: Callable[[], bool]) -> bool:
        """Whether `until` came true before the run was over."""
        while not until():
            if self.over():
                return False
            time.sleep(0.0005)
        return True

    def pause(self, seconds: float) -> bool:
        """Whether the run was not over so many seconds later."""
        end = time.monotonic() + seconds
        return self.wait(lambda: time.monotonic() >= end)

    def send(self, number: signal.Signals, pids: Sequence[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self) -> list[int | None]:
        """The exit codes, when all is over; `outlived` if some had to be killed long after the first ended."""
        self.wait(lambda: any(code is not None for code in self.codes()))
        self.outlived = self.pause(GRACE)
        if self.outlived:
            self.send(signal.SIGKILL, self.pids())
            self.wait(self.over)
        return self.codes()


class Forked(Attempt):
    """Processes of the fork server, which find each other like those of a launcher."""

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
    """What run.py does, in a process of the fork server."""
    from dmdr_train.cli import run_main

    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "the fork server has threads, which a fork would lose"
    multiprocessing.set_start_method(None, force=True)  # as python itself begins
    os.chdir(run)
    os.environ.update(rank)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run_main(arguments)


class Launched(Attempt):
    """run.py, started as people do. The exit codes are the launcher's."""

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
        """Those that have got a rank."""
        if self.alone:
            return [self.launcher.pid]
        with suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.launcher.pid).children(recursive=True)
            return [child.pid for child in children if "LOCAL_RANK" in child.environ()]
        return []

    def codes(self) -> list[int | None]:
        return [self.launcher.poll()]
