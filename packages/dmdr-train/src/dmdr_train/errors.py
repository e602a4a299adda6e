"""A user's mistake: one line that names the key, the value and the fix, and exit code 2."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2
EARLY_WARNING = 4


class UserError(ValueError):
    """`UserError("optim.clip", "must be above 0, got -1")`; the key is a recipe key or a command-line option."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}")


class RunStopped(Exception):  # noqa: N818, not a mistake
    """A run that ends before its last step, in good order and on every process.

    Args:
        code: the exit code, of those above.
        text: the line.
    """

    def __init__(self, code: int, text: str):
        super().__init__(text)
        self.code = code


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Give what another package refuses in the user's files the recipe key that it came from.

    Raises:
        UserError: for a ValueError, an OSError, or a damaged safetensors file.
    """
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(key, str(error)) from error


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn UserError and RunStopped into one line on rank 0's stderr and their exit code; what else is raised is ours.

    Only the first process of a run prints, and it ends first: launchers kill every process once one has ended.
    """
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", EXIT_CODE)
    except RunStopped as stop:
        _end(f"stopped: {stop}", stop.code)


def _end(line: str, code: int) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(" ".join(line.split()), file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    sys.exit(code)
