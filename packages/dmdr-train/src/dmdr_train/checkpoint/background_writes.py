"""Writes that may fail: a checkpoint's files, at once or in the background; other files, again until they succeed."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dmdr_train.base.atomic_files import fingerprint, settle


class Writes:
    """Makes writes until one fails, and stores the reason instead of raising an exception.

    After an exception on one process, the others would wait for it in the next collective operation.

    Attributes:
        fingerprints: size and sha256 of every file written.
        error: the reason why a write failed, or None.

    Args:
        background: first keep a copy of everything in memory; `start` begins to write it.
    """

    def __init__(self, background: bool = False):
        self.background = background
        self.fingerprints: dict[Path, dict[str, Any]] = {}
        self.error: str | None = None
        self._waiting: list[tuple[Callable[..., object], Any, Path]] = []
        self._thread = threading.Thread(target=self._write_all, daemon=True)

    def __call__(self, write: Callable[[Any, Path], object], data: Any, path: Path) -> None:
        """Make a file with `write(data, path)`, now or, in the background, after `start`."""
        if self.background:
            self.attempt(lambda: self._waiting.append((write, tree_map(_copied, data), path)))
        else:
            self._write(write, data, path)

    def attempt(self, act: Callable[[], object]) -> None:
        """Call `act`, which makes no file, unless something has failed before."""
        if self.error is None:
            try:
                act()
            except Exception as error:  # of any kind: the other processes must not wait for this one
                self.error = reason_of(error)

    def start(self) -> None:
        """Begin to write the waiting files."""
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until everything is written or a write has failed."""
        self._thread.join()

    def _write_all(self) -> None:
        while self._waiting:
            self._write(*self._waiting.pop(0))

    def _write(self, write: Callable[[Any, Path], object], data: Any, path: Path) -> None:
        self.attempt(lambda: write(data, path))
        self.attempt(lambda: settle(path))
        self.attempt(lambda: self.fingerprints.__setitem__(path, fingerprint(path)))


class Unhurried:
    """Makes writes that training does not depend on. A failed write is tried again with the next write.

    Args:
        say: called with a warning, one line for each name whose write fails.
    """

    def __init__(self, say: Callable[[str], object]):
        self.say = say
        self.waiting: dict[str, Callable[[], object]] = {}
        self.said: set[str] = set()

    def __call__(self, name: str, write: Callable[[], object]) -> None:
        """Make the file `name` with `write()`, now or later; this replaces a waiting write of the same name."""
        self.waiting[name] = write
        self.again()

    def again(self) -> None:
        """Try all waiting writes."""
        for name, write in list(self.waiting.items()):
            try:
                write()
            except OSError as error:
                if name not in self.said:
                    kept = "it is kept in memory and tried again"
                    self.say(f"warning: {name} could not be written ({reason_of(error)}); {kept}")
                self.said.add(name)
            else:
                del self.waiting[name]
                self.said.discard(name)

    def finish(self) -> None:
        """Try all waiting writes for the last time.

        Raises:
            OSError: of the first write that fails.
        """
        for write in self.waiting.values():
            write()
        self.waiting = {}


def _copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)


def reason_of(error: BaseException) -> str:
    """Return the operating system's message, which torch wraps into an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error) or type(error).__name__
