"""Run `python PROGRAM` in a new process without the seconds that imports cost.

    preload(["torch", "deepspeed"])
    process = start(["-m", "dmdr_train", "report", "out"], folder, {**os.environ}, log, log)
    [code] = wait([process])

Each process that uses this module gets a server, which imports the modules, does nothing else, and forks a process for
every program. Such a process has its own environment, memory, locks and exit code, and can be killed like any other. It
shares only the imported modules and the seed of Python's hashes with the other forked processes. Its collections of
garbage leave out the objects of these modules, whose memory it would have to copy.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path
from typing import Any
from unittest import mock

SERVER = multiprocessing.get_context("forkserver")
GRACE = 30.0
"""Seconds that the other processes have to end after one has failed, as with launchers."""


def preload(modules: Sequence[str]) -> None:
    """Start the server, in this environment; it imports the modules, which may also be in this module's folder."""
    SERVER.set_forkserver_preload(list(modules))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def start(program: Sequence[str], folder: Path, environment: Mapping[str, str], stdout: Path, stderr: Path) -> Process:
    """Start `cd FOLDER && python PROGRAM >> STDOUT 2>> STDERR`.

    Args:
        program: a script, or `-m` and a module, followed by its arguments.
        environment: the whole environment. Of Python's own variables only PYTHONPATH has an effect.
    """
    process = SERVER.Process(target=_become, args=(list(program), folder, dict(environment), stdout, stderr))
    process.start()
    return process


def group(processes: int) -> list[dict[str, str]]:
    """Return the variables that a launcher adds to the environment of each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{k: str(v) for k, v in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(processes)]


def wait(processes: Iterable[Process], timeout: float = float("inf")) -> list[int]:
    """Wait for the processes; return their exit codes in order, negative after a signal.

    If one fails, the others are killed after `GRACE` seconds.

    Args:
        timeout: seconds after which the remaining processes are killed.
    """
    processes = list(processes)
    running: dict[Any, Process] = {process.sentinel: process for process in processes}
    deadline = time.monotonic() + timeout
    while running:
        left = max(0.0, deadline - time.monotonic())
        ended = wait_for(list(running), left if left < float("inf") else None)
        for sentinel in ended:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                deadline = min(deadline, time.monotonic() + GRACE)
        if not ended:
            for process in running.values():
                process.kill()
            deadline = float("inf")
    return [process.exitcode or 0 for process in processes]


def _become(program: list[str], folder: Path, environment: dict[str, str], stdout: Path, stderr: Path) -> None:
    tasks = Path(f"/proc/{os.getppid()}/task")
    assert not tasks.exists() or len(list(tasks.iterdir())) == 1, "a fork loses other threads, and keeps their locks"
    gc.freeze()
    gc.enable()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, stream in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
    multiprocessing.set_start_method(None, force=True)  # the default method, not the fork server
    module = program[0] == "-m"
    sys.argv = program[1:] if module else program
    added = [str(folder if module else Path(program[0]).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:0] = [path for path in added if path]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
