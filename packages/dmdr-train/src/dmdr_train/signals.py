"""The signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which Slurm sends before it preempts.

The first asks: the run finishes its step, writes a checkpoint and exits. A second one ends the process at once.
"""

import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME = 2.0
"""Seconds in which further signals are the first one again: a terminal and a launcher pass on the same Ctrl-C."""


class Signals:
    """While it is open, these signals are remembered in place of what they would do.

    They are read by a thread of their own, since the main one may be waiting inside a collective operation for ever.
    """

    def __init__(self) -> None:
        self.received: str | None = None

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
        while number := self._read.recv(1):
            if number[0] not in STOPPING:
                continue
            if self.received is None:
                self.received, first = signal.Signals(number[0]).name, time.monotonic()
            elif time.monotonic() - first > SAME:
                print(f"a second signal: process {os.getpid()} ends now", file=sys.stderr, flush=True)
                os._exit(128 + number[0])
