"""The other processes of a run: which of them is lost, when a collective operation fails for want of one.

Who survives says so in the store that the process group met in; who does not say so within a while is named. gloo
raises an error in the survivors; NCCL's own watchdog ends them, with a message of its own, after the same time-out.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from dmdr_train.base.errors import LOST, StoppedError, UserError

FAILURES = ("gloo", "pair closure", "Operation timed out!")
"""In the RuntimeErrors that gloo, and torch where it waits for gloo, raise for a process that is lost."""
WAIT = 10.0
"""Seconds in which the survivors are to have said so."""


class Peers:
    """Every process makes one, together with the others, when the process group is up.

    Raises:
        StoppedError: as in `expected`.
    """

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.names: list[Any] = ["unknown process"] * self.world
        if self.world > 1:
            with self.expected():
                dist.all_gather_object(self.names, f"process {os.getpid()} on {socket.gethostname()}")

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Turn the failure of a collective operation inside into a StoppedError that names who is missing.

        Raises:
            StoppedError: with the code LOST, on every process that is left.
        """
        try:
            yield
        except (UserError, StoppedError):
            raise
        except Exception as error:
            failure = next(filter(_of_collective, _chain(error)), None)
            if self.world == 1 or failure is None:
                raise
            missing = self.missing()
            named = ", ".join(f"rank {rank} ({self.names[rank]})" for rank in missing)
            speaker = next((rank for rank in range(self.world) if rank not in missing), self.rank)
            reason = str(failure).splitlines()[0].partition("] ")[2] or str(failure)
            raise StoppedError(
                LOST,
                f"{named or 'another process'} ended, or was not heard of in time ({reason[:80]}); "
                f"the checkpoints are whole; start again with run.resume=auto to go on",
                speaker if 0 not in missing else self.rank,
            ) from error

    def missing(self) -> list[int]:
        """The ranks that do not say that they are left, in order; this takes up to twice `WAIT` seconds."""
        left = {self.rank}
        thread = threading.Thread(target=self._ask, args=(left,), daemon=True)  # a store may never answer
        thread.start()
        thread.join(2 * WAIT + 1)
        if 0 not in left:
            return [0]  # which holds the store
        return [rank for rank in range(self.world) if rank not in left]

    def _ask(self, left: set[int]) -> None:
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()

            def gather(word: str, into: set[int], enough: int) -> None:
                store.set(f"{word}/{self.rank}", "")
                until = time.monotonic() + WAIT
                while len(into) < enough and time.monotonic() < until:
                    into |= {rank for rank in range(self.world) if store.check([f"{word}/{rank}"])}
                    time.sleep(0.1)

            gather("left", left, self.world - 1)
            if self.rank == 0:  # the store goes with it: the others are to have read it
                gather("read", set(), len(left))
            store.set(f"read/{self.rank}", "")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those in whose handling it was raised: what is half done may not be undone without the others."""
    while error is not None:
        yield error
        error = error.__context__


def _of_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in FAILURES)
    )
