"""Writes that may fail: the files of a checkpoint, at once or in the background; others, when there is space again."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from dmdr_train.base.atomic_files import fingerprint, settle


class Writes:
    """Carries out writes until one fails, and remembers why it did.

    An exception on one process would leave the others waiting for it in the next collective operation.

    Attributes:
        fingerprints: size and sha256 of every file written.
        error: why one could not be written, or None.

    Args:
        background: keep a copy of everything in memory instead, and write when `start` is called.
    """

    def __init__(self, background: bool = False):
        self.background = background
        self.fingerprints: dict[Path, dict[str, Any]] = {}
        self.error: str | None = None
        self._waiting: list[tuple[Callable[..., object], Any, Path]] = []
        self._thread = threading.Thread(target=self._write_all, daemon=True)

    def __call__(self, write: Callable[[Any, Path], object], data: Any, path: Path) -> None:
        """Have `write(data, path)` make a file."""
        if self.background:
            self.attempt(lambda: self._waiting.append((write, tree_map(_copied, data), path)))
        else:
            self._write(write, data, path)

    def attempt(self, act: Callable[[], object]) -> None:
        """Do something that makes no file, unless something failed before."""
        if self.error is None:
            try:
                act()
            except Exception as error:  # whatever it is, the others must not wait for this process
                self.error = reason_of(error)

    def start(self) -> None:
        """Begin to write what is waiting."""
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when all is written or has failed."""
        self._thread.join()

    def _write_all(self) -> None:
        while self._waiting:
            self._write(*self._waiting.pop(0))

    def _write(self, write: Callable[[Any, Path], object], data: Any, path: Path) -> None:
        self.attempt(lambda: write(data, path))
        self.attempt(lambda: settle(path))
        self.attempt(lambda: self.fingerprints.__setitem__(path, fingerprint(path)))


class Unhurried:
    """Carries out writes that training can do without, those that fail again together with the next one.

    Args:
        say: takes a warning, a line for each name whose write fails.
    """

    def __init__(self, say: Callable[[str], object]):
        self.say = say
        self.waiting: dict[str, Callable[[], object]] = {}
        self.said: set[str] = set()

    def __call__(self, name: str, write: Callable[[], object]) -> None:
        """Have `write()` make the file `name`, now or later; an earlier write of that name is forgotten."""
        self.waiting[name] = write
        self.again()

    def again(self) -> None:
        """Try what is waiting."""
        for name, write in list(self.waiting.items()):
            try:
                write()
            except OSError as error:
                if name not in self.said:
                    self.say(f"warning: {name} could not be written ({reason_of(error)}); it is kept until it can")
                self.said.add(name)
            else:
                del self.waiting[name]
                self.said.discard(name)

    def finish(self) -> None:
        """Make what is waiting, for the last time.

        Raises:
            OSError: the first that fails.
        """
        for write in self.waiting.values():
            write()
        self.waiting = {}


def _copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)


def reason_of(error: BaseException) -> str:
    """What the operating system said, which torch wraps into an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error) or type(error).__name__
