"""The signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which Slurm sends before it preempts.

The first asks: the run finishes its step, writes a checkpoint and exits. A second one ends the process at once. The end
of a launcher asks, too: who kills `deepspeed` or `torchrun` may have reached no other process, and would leave a run
behind that holds its folder.
"""

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import psutil

from dmdr_train.base.errors import STOPPED

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME = 1.0
"""Seconds in which further signals are the first one again: a terminal and a launcher pass on the same Ctrl-C."""
LOOK = 1.0
"""Seconds after which the launchers are looked at again."""
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch"}


@contextmanager
def signals_end() -> Iterator[None]:
    """In this, but where `Signals` are open, these signals end the process with a line: there is nothing to save.

    After an error they are ignored, so that the process ends with the code of that.
    """

    def end(number: int, _: object) -> None:
        os.write(2, f"stopped: by {signal.Signals(number).name}, outside of training; start again\n".encode())
        os._exit(STOPPED)

    before: dict[signal.Signals, Any] = {number: signal.signal(number, end) for number in STOPPING}
    try:
        yield
    except Exception:
        before = dict.fromkeys(STOPPING, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Launchers:
    """The launchers that have started this process, the one by the other: there as long as they are its ancestors."""

    def __init__(self) -> None:
        found = list(itertools.takewhile(_launches, psutil.Process().parents()))
        self.children = [psutil.Process(), *found[:-1]] if found else []
        self.expected = [process.pid for process in found]

    @property
    def gone(self) -> bool:
        try:
            return [process.ppid() for process in self.children] != self.expected
        except psutil.NoSuchProcess:
            return True


def _launches(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:5]
    except psutil.Error:
        return False
    return any(os.path.basename(word) in LAUNCHERS for word in words)


class Signals:
    """While it is open, these signals are remembered in place of what they would do.

    They are read by a thread of their own, since the main one may be waiting inside a collective operation for ever.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.launchers = Launchers()

    def __enter__(self) -> "Signals":
        self._written, self._read = socket.socketpair()
        self._written.setblocking(False)
        self._fd = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in STOPPING}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd)
        self._written.close()
        self._thread.join()
        self._read.close()

    def _listen(self) -> None:
        first = 0.0
        self._read.settimeout(LOOK)
        while (number := self._next()) is not None:
            if number not in (0, *STOPPING):
                continue
            if self.received is None:
                self.received = signal.Signals(number).name if number else "the end of its launcher"
                first = time.monotonic()
            elif number and time.monotonic() - first > SAME:
                print(f"a second signal: process {os.getpid()} ends now", file=sys.stderr, flush=True)
                os._exit(128 + number)

    def _next(self) -> int | None:
        """The next signal, 0 where the launcher is gone; None if there will be none."""
        while True:
            try:
                return next(iter(self._read.recv(1)), None)
            except TimeoutError:
                if self.received is None and self.launchers.gone:
                    return 0
