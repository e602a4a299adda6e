"""`python PROGRAM` in a process of its own that does not spend seconds on imports.

    preload(["torch", "deepspeed"])
    process = start(["-m", "dmdr_train", "report", "out"], folder, {**os.environ}, log, log)
    [code] = wait([process])

A server, one of every process that asks for it, has imported the modules and done nothing else; it forks a process for
every program. That is as real as any other: it has its own environment, memory, locks and exit code, and can be killed.
What it shares with its sisters is what was imported, and the seed of Python's hashes.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import wait as wait_for
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
GRACE = 30.0
"""Seconds in which the others are to end after one has failed, as launchers give them."""


def preload(modules: Sequence[str]) -> None:
    """What the server imports, in the environment in which the first process is started."""
    SERVER.set_forkserver_preload(list(modules))


def start(program: Sequence[str], folder: Path, environment: Mapping[str, str], stdout: Path, stderr: Path) -> Process:
    """`cd FOLDER && python PROGRAM >> STDOUT 2>> STDERR`.

    Args:
        program: a script, or `-m` and a module; and its arguments.
        environment: all of it. Of Python's own variables only PYTHONPATH has an effect.
    """
    process = SERVER.Process(target=_become, args=(list(program), folder, dict(environment), stdout, stderr))
    process.start()
    return process


def group(processes: int) -> list[dict[str, str]]:
    """What a launcher adds to the environment of each of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{k: str(v) for k, v in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(processes)]


def wait(processes: Iterable[Process], timeout: float = float("inf")) -> list[int]:
    """Their exit codes, in order, once all have ended; a signal's is negative.

    Args:
        timeout: seconds after which those that are left are killed, if none fails and they are killed for that.
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
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, stream in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), stream)
    multiprocessing.set_start_method(None, force=True)  # the default one, not the server
    module = program[0] == "-m"
    sys.argv = program[1:] if module else program
    added = [str(folder if module else Path(program[0]).parent), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:0] = [path for path in added if path]
    if module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
