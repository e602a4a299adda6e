"""What happens to the runs of soak.py: each fault waits for its moment, strikes, and may leave something behind."""

import os
import random
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dmdr_train.base.errors import EXIT_CODE, LOST, NOT_SAVED, STOPPED, UserError
from dmdr_train.checkpoint.find import checkpoints_in, step_of
from dmdr_train.checkpoint.manifest import verify
from soak_starts import GRACE, Attempt


@dataclass(frozen=True)
class Pace:
    """How long the parts of the undisturbed run took, in seconds, and how many there are.

    Args:
        start: from its start until it had begun.
        step: a step, with what comes between steps.
        rest: from the last step to the end.
        write: a checkpoint.
        steps, every, timeout: `run.steps`, `run.checkpoint_every` and `run.timeout`.
    """

    start: float
    step: float
    rest: float
    write: float
    steps: int
    every: int
    timeout: float


class Left(NamedTuple):
    """What a fault leaves: how it is to be told, and a file, relative to the run's folder, that it has damaged."""

    told: str
    damaged: Path | None = None


class Fault(ABC):
    """Something that happens to a run.

    Args:
        name: its row in the table.
        draws: where its randomness comes from.
    """

    kind = ""
    """The column that it counts in."""
    code: int | None = None
    """What all processes end with, where that is certain; 0 if the run is to take no notice."""

    def __init__(self, name: str, pace: Pace, draws: random.Random):
        self.name, self.pace, self.draws = name, pace, draws

    def moment(self, attempt: Attempt, step: int) -> bool:
        """Wait for it, in an attempt that goes on from `step`; whether the run was not over before.

        Here: at any of the steps, once the run has begun.
        """
        return self.reached(attempt, self.draws.randrange(step, max(step + 1, self.pace.steps)))

    def reached(self, attempt: Attempt, step: int) -> bool:
        """Wait until a step is over and a little longer, at most until the next one is."""
        length = self.pace.rest if step == self.pace.steps else self.pace.step
        there = attempt.wait(lambda: attempt.begun() and attempt.logged() >= step)
        return there and attempt.pause(self.draws.uniform(0, length))

    @abstractmethod
    def strike(self, attempt: Attempt) -> None:
        """Do it."""

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        """What is wrong with how the processes ended; empty if nothing is."""
        return f"ended with {codes}" if self.code is not None and set(codes) != {self.code} else ""

    def left(self, attempt: Attempt, where: str) -> Left | None:
        """What is there when the run is over, and was at `where`; None if the fault could not do its worst."""
        return Left(where)


class Kill(Fault):
    """At any step, in the start before them, or in what comes after them; of several processes one, or all."""

    kind = "kill -9"

    def moment(self, attempt: Attempt, step: int) -> bool:
        chosen = self.draws.randint(step - 1, self.pace.steps)
        if chosen >= step:
            return self.reached(attempt, chosen)
        return attempt.wait(lambda: bool(attempt.pids())) and attempt.pause(self.draws.uniform(0, self.pace.start))

    def strike(self, attempt: Attempt) -> None:
        pids = attempt.pids()
        self.hit = self.draws.choice([pids, *([pid] for pid in pids)])
        attempt.send(signal.SIGKILL, self.hit)

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        """Those that are left end in good order, and name the one that is not."""
        left = {code for code in codes if code != -signal.SIGKILL}
        if not left <= {0, LOST}:
            return f"ended with {codes}"
        named = not attempt.begun() or f"(process {self.hit[0]} on" in attempt.log.read_text()
        return "" if named or LOST not in left else f"does not name process {self.hit[0]}"


class Hang(Kill):
    """One of several processes stands still, and does not even end."""

    kind = "stand still"

    def moment(self, attempt: Attempt, step: int) -> bool:
        return self.reached(attempt, self.draws.randrange(step, max(step + 1, self.pace.steps)))

    def strike(self, attempt: Attempt) -> None:
        self.hit = [self.draws.choice(attempt.pids())]
        attempt.send(signal.SIGSTOP, self.hit)
        end = time.monotonic() + self.pace.timeout + GRACE
        attempt.wait(lambda: attempt.codes().count(None) == 1 or time.monotonic() > end)
        self.late = attempt.codes().count(None) > 1
        attempt.send(signal.SIGKILL, self.hit)

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        return "went on waiting" if self.late else super().wrong(attempt, codes)


class KillWriting(Kill):
    """While one of the next checkpoints is written, or just after."""

    def moment(self, attempt: Attempt, step: int) -> bool:
        seen: set[Path] = set()
        left = (self.pace.steps - step) // self.pace.every
        number = self.draws.randint(1, min(3, left)) if left else 1

        def writing() -> bool:
            seen.update(unfinished(attempt))
            return len(seen) == number

        return attempt.wait(writing) and attempt.pause(self.draws.uniform(0, 0.7 * self.pace.write))


class Signal(Fault):
    """One process gets the signal that the fault is named after."""

    kind = "signals"
    code = STOPPED

    def strike(self, attempt: Attempt) -> None:
        attempt.send(signal.Signals[self.name], [self.draws.choice(attempt.pids())])

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        saved = [step_of(path) for path in undamaged(attempt)[-1:]]
        lost = "" if saved == [attempt.logged()] else f"saved {saved or 'nothing'} at step {attempt.logged()}"
        return super().wrong(attempt, codes) or lost

    def left(self, attempt: Attempt, where: str) -> Left:
        return Left("it saved and ended")


def changed(content: bytes, draws: random.Random, others: list[bytes]) -> bytes:
    at = draws.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draws.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, draws: random.Random, others: list[bytes]) -> bytes:
    return content[: draws.randrange(len(content))]


def swapped(content: bytes, draws: random.Random, others: list[bytes]) -> bytes:
    return draws.choice(others)


DAMAGES = {
    "a bit of a checkpoint's file changed": changed,
    "a checkpoint's file cut short": cut,
    "a checkpoint's file swapped for another": swapped,
    "a checkpoint's file gone": None,
}


class Damage(Kill):
    """The run is killed, and a file of the newest of its checkpoints suffers what the fault is named after."""

    kind = "damaged files"

    def moment(self, attempt: Attempt, step: int) -> bool:
        return self.reached(attempt, self.draws.randint(max(step, 2 * self.pace.every), self.pace.steps))

    def left(self, attempt: Attempt, where: str) -> Left | None:
        found = undamaged(attempt)
        if len(found) < 2:
            return None
        files = {path: path.read_bytes() for path in sorted(found[-1].rglob("*")) if path.is_file()}
        path = self.draws.choice(list(files))
        damage = DAMAGES[self.name]
        if damage:
            others = [other for other in files.values() if other != files[path]]
            path.write_bytes(damage(files[path], self.draws, others))
        else:
            path.unlink()
        return Left(str(path.relative_to(found[-1])), path.relative_to(attempt.run))


class FullDisk(Fault):
    """From some moment on no checkpoint can be written. The run trains on to its end, which it cannot save."""

    kind = "full disks"
    code = NOT_SAVED
    filled = "checkpoints"

    def strike(self, attempt: Attempt) -> None:
        folder = attempt.out / self.filled
        sizes = [path.stat().st_size for kept in undamaged(attempt)[-1:] for path in kept.rglob("*")]
        spare = self.draws.randrange(sum(sizes) or 1 << 16)  # so that a write ends anywhere
        self.fill(folder, spare, attempt.over)

    def fill(self, folder: Path, spare: int, until: Callable[[], bool]) -> None:
        """Leave so many bytes of a folder's file system, and those that are freed meanwhile, to nobody."""
        with (folder / "filling").open("wb") as file:
            while not until():
                more = shutil.disk_usage(folder).free - spare
                with suppress(OSError):  # the run was quicker
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), max(1, more))
                time.sleep(0.001)
        (folder / "filling").unlink()

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        stopped = "" if attempt.logged() == self.pace.steps else f"stopped at step {attempt.logged()}"
        return super().wrong(attempt, codes) or stopped

    def left(self, attempt: Attempt, where: str) -> Left:
        return Left("it trained on to an end that it could not save")


class FullLogs(FullDisk):
    """Until the run says so, nothing can be written but checkpoints."""

    code = 0
    filled = "."

    def moment(self, attempt: Attempt, step: int) -> bool:
        return self.reached(attempt, self.draws.randint(step, max(step, self.pace.steps // 2)))

    def strike(self, attempt: Attempt) -> None:
        self.fill(attempt.out, 0, lambda: attempt.over() or self.said(attempt))

    def said(self, attempt: Attempt) -> bool:
        return "metrics.jsonl cannot be written; its rows are kept" in attempt.log.read_text()

    def left(self, attempt: Attempt, where: str) -> Left | None:
        return Left("it trained on and wrote all of it later") if self.said(attempt) else None


class SecondRun(Fault):
    """Somebody starts the same run a second time."""

    kind = "second runs"
    code = 0

    def __init__(self, name: str, pace: Pace, draws: random.Random, start: Callable[[Path, Path], Attempt]):
        super().__init__(name, pace, draws)
        self.start = start

    def moment(self, attempt: Attempt, step: int) -> bool:
        return self.reached(attempt, step)

    def strike(self, attempt: Attempt) -> None:
        pids = attempt.pids()
        attempt.send(signal.SIGSTOP, pids)  # else it might be over before the second looks
        self.second = self.start(attempt.run, attempt.log.with_suffix(".second.log"))
        self.codes = self.second.end()
        attempt.send(signal.SIGCONT, pids)

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        refused = set(self.codes) == {EXIT_CODE} and "is in use by process" in self.second.log.read_text()
        return super().wrong(attempt, codes) or ("" if refused else f"did not keep a second run out: {self.codes}")

    def left(self, attempt: Attempt, where: str) -> Left:
        return Left("the second was refused")


def unfinished(attempt: Attempt, ending: str = "partial") -> list[Path]:
    """Checkpoints that this attempt has begun to write, or to remove."""
    return [path for path in attempt.out.glob(f"checkpoints/.step-*.{ending}") if attempt.younger(path)]


def undamaged(attempt: Attempt) -> list[Path]:
    """The checkpoints that the run could go on from, oldest first."""
    found = []
    for path in checkpoints_in(attempt.out / "checkpoints"):
        with suppress(UserError, OSError):  # damaged, or just being removed
            verify("", path)
            found.append(path)
    return found


@contextmanager
def small_disks(out: Path) -> Iterator[None]:
    """A small file system in the place of a run's folder, which is made, and another for its checkpoints."""
    with small_disk(out), small_disk(out / "checkpoints"):
        yield


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether there can be such file systems here; `folder` is a new one."""
    with suppress(subprocess.CalledProcessError, OSError), small_disk(folder):
        return True
    return False
