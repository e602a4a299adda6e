"""Find out which processes of a run are lost, after a collective operation has failed.

Every surviving process sets a key in the process group's store; the processes that set none in time are lost. gloo
raises an error in the survivors. NCCL's own watchdog ends them, with its own message, after the same time-out.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from dmdr_train.base.errors import StoppedError, UserError
from dmdr_train.base.exit_codes import LOST

FAILURES = ("gloo", "pair closure", "Operation timed out!")
"""Parts of the RuntimeErrors that gloo, and torch when it waits for gloo, raise if a process is lost."""
WAIT = 10.0
"""Seconds in which the survivors must set their key."""
RESUME = "the checkpoints are complete; start again with run.resume=auto to resume"
"""What the user of a training can do."""


class Peers:
    """The names of all processes; every process creates this object at the same time, after joining the process group.

    Args:
        fix: what the user can do after a process is lost, for the message.

    Raises:
        StoppedError: as in `expected`.
    """

    def __init__(self, fix: str = RESUME) -> None:
        self.fix = fix
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.names: list[Any] = ["unknown process"] * self.world
        if self.world > 1:
            with self.expected():
                dist.all_gather_object(self.names, f"process {os.getpid()} on {socket.gethostname()}")

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Turn a failed collective operation inside the context into a StoppedError that names the lost processes.

        Raises:
            StoppedError: with the code LOST, on every surviving process.
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
                f"{named or 'another process'} ended, or did not answer in time ({reason[:80]}); {self.fix}",
                speaker if 0 not in missing else self.rank,
            ) from error

    def missing(self) -> list[int]:
        """Return the lost ranks in ascending order; this takes up to twice `WAIT` seconds."""
        left = {self.rank}
        thread = threading.Thread(target=self._ask, args=(left,), daemon=True)  # a store may never answer
        thread.start()
        thread.join(2 * WAIT + 1)
        if 0 not in left:
            return [0]  # rank 0 holds the store
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
            if self.rank == 0:  # the store ends with rank 0, so the others must have read it before
                gather("read", set(), len(left))
            store.set(f"read/{self.rank}", "")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that were being handled when it was raised.

    The cleanup after the loss of a process may fail, too, since it needs the other processes.
    """
    while error is not None:
        yield error
        error = error.__context__


def _of_collective(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in FAILURES)
    )
