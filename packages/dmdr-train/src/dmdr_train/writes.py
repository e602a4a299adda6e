"""The files that this process writes of a checkpoint: at once, or copies of them in the background."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils._pytree import tree_map

from dmdr_train.files import fingerprint


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
            self._waiting.append((write, tree_map(_copied, data), path))
        else:
            self._write(write, data, path)

    def attempt(self, act: Callable[[], object]) -> None:
        """Do something that makes no file, unless something failed before."""
        if self.error is None:
            try:
                act()
            except (OSError, RuntimeError, SafetensorError) as error:
                self.error = _reason(error)

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
        self.attempt(lambda: self.fingerprints.__setitem__(path, fingerprint(path)))


def _copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)


def _reason(error: BaseException) -> str:
    """What the operating system said, which torch wraps into an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)
