"""The signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which Slurm sends before it preempts.

After the first signal the run finishes its step, writes a checkpoint and exits. A second signal ends the process at
once. The end of a launcher counts as a signal, too: a kill of `deepspeed` or `torchrun` may reach no other process, and
would otherwise leave a run behind that holds its folder.
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

from dmdr_train.base.exit_codes import STOPPED

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME = 1.0
"""Seconds in which further signals count as the first: a terminal and a launcher both pass on the same Ctrl-C."""
LOOK = 1.0
"""Seconds between two checks of the launchers."""
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch"}


@contextmanager
def signals_end() -> Iterator[None]:
    """Inside this context, but outside of `Signals`, a signal ends the process with a line, since nothing is to save.

    After an error further signals are ignored, so that the process ends with the code of the error.
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
    """The chain of launchers that started this process; they are alive as long as they are its ancestors."""

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
    """While this context is open, the first signal is only recorded, in `received`.

    A separate thread reads the signals, since the main thread may wait inside a collective operation forever.
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
        """Wait for the next signal; 0 if the launcher is gone, None when the context is closed."""
        while True:
            try:
                return next(iter(self._read.recv(1)), None)
            except TimeoutError:
                if self.received is None and self.launchers.gone:
                    return 0
