"""Two hosts with a link: network namespaces, each with an address, a name and a process of the run."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import forking
import pytest
import torch
from dmdr_train.checkpoint.find import checkpoints_in
from dmdr_train.checkpoint.manifest import verify
from forking import Process
from safetensors.torch import load_file

ROOT, BIN, RUN = Path(__file__).parents[2], Path(sys.executable).parent, "packages/dmdr-train/run.py"
STEPS = 12
LINK = "link0"
ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
# Moves a forked process to a host, as `ip netns exec SPACE unshare --uts` does, and runs a program there.
ENTER = """
import ctypes, runpy, socket, sys
space, name, *sys.argv = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
NEW_NETWORK, NEW_NAMES = 0x40000000, 0x04000000
with open(f"/run/netns/{space}") as file:
    assert libc.setns(file.fileno(), NEW_NETWORK) == 0, ctypes.get_errno()
assert libc.unshare(NEW_NAMES) == 0, ctypes.get_errno()
socket.sethostname(name)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Host:
    """A network namespace whose only way out is the link."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.folder = name, folder
        self.environment = {**environment, "GLOO_SOCKET_IFNAME": LINK}
        self.space = f"dmdr-{os.getpid()}-{name}"
        self.running: list[subprocess.Popen[str]] = []
        self.forked: list[Process] = []

    def link(self, state: str) -> None:
        ip("-n", self.space, "link", "set", LINK, state)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        named = ["sh", "-c", 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"', f"{self.name}-host"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.space, "unshare", "--uts", *named, *command],
            cwd=self.folder,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.running.append(process)
        return process

    def fork(self, *program: str, **variables: str) -> Process:
        """Start a Python program in a forked process, which has imported everything; `log` gets its output."""
        enter = self.folder / "enter.py"
        enter.write_text(ENTER)
        command = [str(enter), self.space, f"{self.name}-host", *program]
        process = forking.start(command, self.folder, {**self.environment, **variables}, self.log, self.log)
        self.forked.append(process)
        return process

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def end(self) -> None:
        for forked in self.forked:
            forked.kill()
            forked.join()
        for process in self.running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        ip("netns", "delete", self.space)


def output(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=300)[0]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(workshop: Any, plain_environment: dict[str, str]) -> Iterator[tuple[Host, Host]]:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("network namespaces need root, ip (iproute2) and unshare (util-linux)")
    first, second = (Host(name, workshop.folder, plain_environment) for name in ADDRESSES)
    made = []
    try:
        for host in (first, second):
            ip("netns", "add", host.space)
            made.append(host)
        ip("link", "add", LINK, "netns", first.space, "type", "veth", "peer", "name", LINK, "netns", second.space)
        for host in made:
            ip("-n", host.space, "address", "add", f"{ADDRESSES[host.name]}/24", "dev", LINK)
            ip("-n", host.space, "link", "set", "lo", "up")
            host.link("up")
        subprocess.run(
            ["ip", "netns", "exec", first.space, "unshare", "--uts", "true"], check=True, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        for host in made:
            host.end()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    yield first, second
    for host in made:
        host.end()


def documented(words: str, **given: str) -> list[str]:
    """Return the command of docs/clusters.md that contains these words, adapted to this machine."""
    manual = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    (found,) = [text for text in manual.splitlines() if words in text and "RECIPE" in text]
    known = {"deepspeed": str(BIN / "deepspeed"), "python": sys.executable, RUN: str(ROOT / RUN), **given}
    return [known.get(word, word) for word in shlex.split(found)]


def test_a_cut_link_stops_both_hosts_and_the_run_goes_on(
    hosts: tuple[Host, Host], workshop: Any, read_rows: Any
) -> None:
    """Start with DeepSpeed's launcher on each host, resume as with Slurm: the weights equal an undisturbed run's."""
    workshop.recipe["objectives"] = [{"kind": "distribution_matching"}]
    workshop.recipe["optim"] |= {"batch_size": 2, "accumulation": 1}
    workshop.recipe["run"] = {"output": "out", "steps": STEPS, "checkpoint_every": 2}
    workshop.recipe["tracking"] = {"log_every": 1, "tensorboard": False, "samples": {"count": 2}}
    workshop.write()
    (workshop.folder / "hosts").write_text("first slots=1\nsecond slots=1\n")
    out = workshop.folder / "out"

    processes = [
        host.start(*documented("--no_ssh", N=str(rank), A=ADDRESSES["first"], RECIPE="recipe.yaml"), "run.timeout=12")
        for rank, host in enumerate(hosts)
    ]
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, output(ended[0])
        time.sleep(0.02)
    hosts[1].link("down")
    # Meanwhile both hosts wait for each other in vain.
    workshop.run("run.output=whole", processes=2).check()
    said = [output(process) for process in processes]
    for process, text, rank, host in zip(processes, said, (1, 0), ("second", "first"), strict=True):
        assert process.returncode == 69, text
        (line,) = [line for line in text.splitlines() if line.startswith("stopped: ")]
        assert line.startswith(f"stopped: rank {rank} (process ")
        assert f" on {host}-host) ended, or did not answer in time (" in line
        assert "Traceback" not in text
    assert len(read_rows(out)) < STEPS
    for checkpoint in checkpoints_in(out / "checkpoints"):
        verify("run.resume", checkpoint)

    hosts[1].link("up")
    command = documented("srun --nodes", RECIPE="recipe.yaml")
    program = command[command.index(sys.executable) + 1 :]  # what srun would start with python; there is no srun here
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "10.77.0.[1-2]"}
    resumed = [
        host.fork(*program, **step, SLURM_PROCID=str(rank), SLURM_LOCALID="0") for rank, host in enumerate(hosts)
    ]
    assert forking.wait(resumed, timeout=300) == [0, 0], [host.log.read_text() for host in hosts]
    assert not list((out / "checkpoints").glob(".*"))
    assert read_rows(out) == read_rows(workshop.folder / "whole")
    for name in ("generator", "student", "fake_score"):
        ours, whole = (
            load_file(workshop.folder / f"{each}/checkpoints/step-{STEPS:08d}/{name}.safetensors")
            for each in ("out", "whole")
        )
        assert ours.keys() == whole.keys()
        assert all(torch.equal(ours[key], whole[key]) for key in ours), name
