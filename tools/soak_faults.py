"""The faults of soak.py: each waits for its moment, strikes, and may leave damage behind."""

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

from dmdr_train.base.errors import UserError
from dmdr_train.base.exit_codes import EXIT_CODE, LOST, NOT_SAVED, STOPPED
from dmdr_train.checkpoint.find import checkpoints_in, step_of
from dmdr_train.checkpoint.manifest import verify
from soak_starts import GRACE, Attempt


@dataclass(frozen=True)
class Pace:
    """The durations of the undisturbed run's parts, in seconds, and its settings.

    Args:
        start: from the start until the run had opened its folder.
        step: one step, including the work between steps.
        rest: from the last step to the end.
        write: writing a checkpoint.
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
    """The effect of a fault: its text for the table, and the damaged file, relative to the run's folder."""

    told: str
    damaged: Path | None = None


class Fault(ABC):
    """A fault that happens to a run.

    Args:
        name: its row in the table.
        draws: the source of its randomness.
    """

    kind = ""
    """The column in which it counts."""
    code: int | None = None
    """The exit code of all processes, if it is certain; 0 if the run must continue as if nothing had happened."""

    def __init__(self, name: str, pace: Pace, draws: random.Random):
        self.name, self.pace, self.draws = name, pace, draws

    def moment(self, attempt: Attempt, step: int) -> bool:
        """Wait for the moment, in an attempt that resumes from `step`; return False if the run ended first.

        By default the moment is at any of the steps, once the run has begun.
        """
        return self.reached(attempt, self.draws.randrange(step, max(step + 1, self.pace.steps)))

    def reached(self, attempt: Attempt, step: int) -> bool:
        """Wait until a step is over, and then for a random part of the next step."""
        length = self.pace.rest if step == self.pace.steps else self.pace.step
        there = attempt.wait(lambda: attempt.begun() and attempt.logged() >= step)
        return there and attempt.pause(self.draws.uniform(0, length))

    @abstractmethod
    def strike(self, attempt: Attempt) -> None:
        """Cause the fault."""

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        """Return what is wrong with the end of the processes; an empty string if nothing is."""
        return f"ended with {codes}" if self.code is not None and set(codes) != {self.code} else ""

    def left(self, attempt: Attempt, where: str) -> Left | None:
        """Return the effect after the run's end at the place `where`; None if the fault could not take effect."""
        return Left(where)


class Kill(Fault):
    """Kill one or all processes: during the start, at any step, or after the last step."""

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
        """The other processes must end with the right code and name the killed process."""
        left = {code for code in codes if code != -signal.SIGKILL}
        if not left <= {0, LOST}:
            return f"ended with {codes}"
        named = not attempt.begun() or f"(process {self.hit[0]} on" in attempt.log.read_text()
        return "" if named or LOST not in left else f"does not name process {self.hit[0]}"


class Hang(Kill):
    """Stop one of several processes, which then neither works nor ends."""

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
    """Kill processes while one of the next checkpoints is written, or just after."""

    def moment(self, attempt: Attempt, step: int) -> bool:
        seen: set[Path] = set()
        left = (self.pace.steps - step) // self.pace.every
        number = self.draws.randint(1, min(3, left)) if left else 1

        def writing() -> bool:
            seen.update(unfinished(attempt))
            return len(seen) == number

        return attempt.wait(writing) and attempt.pause(self.draws.uniform(0, 0.7 * self.pace.write))


class Signal(Fault):
    """Send the signal of the fault's name to one process."""

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
    """Kill the run, and damage a file of its newest checkpoint in the way of the fault's name."""

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
    """Fill the disk of the checkpoints from some moment on. The run trains to its end but cannot save it."""

    kind = "full disks"
    code = NOT_SAVED
    filled = "checkpoints"

    def strike(self, attempt: Attempt) -> None:
        folder = attempt.out / self.filled
        sizes = [path.stat().st_size for kept in undamaged(attempt)[-1:] for path in kept.rglob("*")]
        spare = self.draws.randrange(sum(sizes) or 1 << 16)  # so that a write can fail at any position
        self.fill(folder, spare, attempt.over)

    def fill(self, folder: Path, spare: int, until: Callable[[], bool]) -> None:
        """Keep a folder's file system full except for `spare` bytes, until `until` is true."""
        with (folder / "filling").open("wb") as file:
            while not until():
                more = shutil.disk_usage(folder).free - spare
                with suppress(OSError):  # the run has taken the space first
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), max(1, more))
                time.sleep(0.001)
        (folder / "filling").unlink()

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        stopped = "" if attempt.logged() == self.pace.steps else f"stopped at step {attempt.logged()}"
        return super().wrong(attempt, codes) or stopped

    def left(self, attempt: Attempt, where: str) -> Left:
        return Left("it trained on to an end that it could not save")


class FullLogs(FullDisk):
    """Fill the disk of everything except the checkpoints, until the run reports it."""

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
    """Start the same run a second time while it is running."""

    kind = "second runs"
    code = 0

    def __init__(self, name: str, pace: Pace, draws: random.Random, start: Callable[[Path, Path], Attempt]):
        super().__init__(name, pace, draws)
        self.start = start

    def moment(self, attempt: Attempt, step: int) -> bool:
        return self.reached(attempt, step)

    def strike(self, attempt: Attempt) -> None:
        pids = attempt.pids()
        attempt.send(signal.SIGSTOP, pids)  # otherwise it might end before the second run checks the lock
        self.second = self.start(attempt.run, attempt.log.with_suffix(".second.log"))
        self.codes = self.second.end()
        attempt.send(signal.SIGCONT, pids)

    def wrong(self, attempt: Attempt, codes: list[int | None]) -> str:
        refused = set(self.codes) == {EXIT_CODE} and "is in use by process" in self.second.log.read_text()
        return super().wrong(attempt, codes) or ("" if refused else f"did not keep a second run out: {self.codes}")

    def left(self, attempt: Attempt, where: str) -> Left:
        return Left("the second was refused")


def unfinished(attempt: Attempt, ending: str = "partial") -> list[Path]:
    """Return the checkpoints that this attempt has begun to write or, with ending "removed", to remove."""
    return [path for path in attempt.out.glob(f"checkpoints/.step-*.{ending}") if attempt.younger(path)]


def undamaged(attempt: Attempt) -> list[Path]:
    """Return the checkpoints from which the run could resume, oldest first."""
    found = []
    for path in checkpoints_in(attempt.out / "checkpoints"):
        with suppress(UserError, OSError):  # damaged, or being removed at this moment
            verify("", path)
            found.append(path)
    return found


@contextmanager
def small_disks(out: Path) -> Iterator[None]:
    """Make a run's folder and mount a small file system there, and another for its checkpoints."""
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
    """Return whether such file systems can be mounted here; `folder` must not exist."""
    with suppress(subprocess.CalledProcessError, OSError), small_disk(folder):
        return True
    return False
