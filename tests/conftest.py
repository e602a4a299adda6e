"""Fixtures for all tests: one thread, and programs in forked processes, which need not import torch again."""

import gc
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import forking
import pytest

# Before torch is imported: for the tests' small tensors a second thread costs more than it gains.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Numbers at the ticks take half of the time in which curves are drawn, and no test reads them.
os.environ.setdefault("MATPLOTLIBRC", str(Path(__file__).with_name("matplotlibrc")))

# Variables of launchers and earlier tests, which would make a plain process part of a group.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK")
# Objects of imported modules stay: collections of garbage during the imports would only cost time.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders whose files take long; short files at the end let both workers end together.

    The first file of all forks the workers of a DataLoader: after other tests, the process may be too large to fork.
    """
    long = ("end_to_end", "tools", "train")
    items.sort(key=lambda item: (item.path.name != "test_score_command.py", item.path.parent.name not in long))


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def imports_are_kept_out_of_collections() -> None:
    """Freeze the objects of earlier imports: DeepSpeed collects garbage for each engine, for 0.7 s with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """Restore torch's `linear`, which DeepSpeed's ZeRO-3 replaces, for later tests in the same process."""
    import torch.nn.functional as F

    own = F.linear
    yield
    F.linear = own


@dataclass
class Outcome:
    """The result of a program, in one process or several."""

    codes: list[int]
    stdout: str
    stderr: str

    @property
    def code(self) -> int:
        """The exit code of the only process, or of the first one, in order, that failed."""
        return next(filter(None, self.codes), 0)

    def check(self) -> "Outcome":
        assert self.code == 0, self.stderr[-4000:]
        return self

    @property
    def remarks(self) -> list[str]:
        """The lines of stderr without progress bars, and without what torchao causes torch and diffusers to say."""
        others = r"\[\d\d:\d\d[<,]|torch/utils/_pytree\.py|`torchao`"
        lines = re.split(r"[\r\n]+", self.stderr)
        return [line for line in map(str.strip, lines) if line and not re.search(others, line)]

    @property
    def errors(self) -> list[str]:
        """Our own error lines, without the logs of launchers and libraries."""
        return [line.removeprefix("error: ") for line in self.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="session")
def launch() -> Callable[[str, int], list[str]]:
    return command


def command(launcher: str, processes: int) -> list[str]:
    """Return the part of a command before run.py."""
    folder, port = Path(sys.executable).parent, 29600 + os.getpid() % 300
    return {
        "python": [sys.executable],
        "torchrun": [f"{folder}/torchrun", "--standalone", "--nproc_per_node", f"{processes}"],
        "deepspeed": [f"{folder}/deepspeed", "--num_accelerators", f"{processes}", "--master_port", f"{port}"],
    }[launcher]


@pytest.fixture(scope="session")
def plain_environment() -> dict[str, str]:
    """Return the environment of a process without a launcher, on the CPU, without a network."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**kept, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def python(plain_environment: dict[str, str]) -> Callable[..., Outcome]:
    """Run `python PROGRAM` in a folder: in forked processes, or, if a launcher is given, with that launcher."""
    with mock.patch.dict(os.environ, plain_environment, clear=True):
        forking.preload(["forked_runs"])

    def python(
        *program: str, folder: Path, processes: int = 1, launcher: str | None = None, **variables: str
    ) -> Outcome:
        if launcher is not None:
            started = [*command(launcher, processes), *program]
            done = subprocess.run(
                started, cwd=folder, env=plain_environment | variables, capture_output=True, text=True, timeout=600
            )
            return Outcome([done.returncode], done.stdout, done.stderr)
        with tempfile.TemporaryDirectory() as made:
            logs = Path(made, "stdout"), Path(made, "stderr")
            ranks = forking.group(processes) if processes > 1 else [{}]
            running = [forking.start(program, folder, plain_environment | variables | rank, *logs) for rank in ranks]
            return Outcome(forking.wait(running, timeout=600), *(log.read_text() for log in logs))

    return python
