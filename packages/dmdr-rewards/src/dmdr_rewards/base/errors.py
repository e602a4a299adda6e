"""The errors of this package, and how `dmdr-score` reports them: one line on stderr, and an exit code.

    RewardsError             base class, a ValueError
    ├── UserError            a mistake in what was typed; exit code 2
    │   └── StoppedError     the run began and cannot continue; exit code 1
    ├── MissingError         a file of a checkpoint is not there
    └── UnansweredError      an endpoint gave no score for one picture

Functions that are called from Python raise plain ValueErrors for arguments that they refuse.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dmdr_rewards.base.secrets import redacted

USER_ERROR = 2
"""Exit code: the command cannot run as typed. Nothing was loaded or changed."""
STOPPED = 1
"""Exit code: the run began and cannot continue. Finished scores are kept, and the same command continues from them."""


class RewardsError(ValueError):
    """Base class of the errors of this package."""


class UserError(RewardsError):
    """`UserError("--prompts", "prompts.csv has no column prompt")`: the option or argument, then value and fix."""

    exit_code = USER_ERROR

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")


class StoppedError(UserError):
    """The run has begun and cannot continue."""

    exit_code = STOPPED


class MissingError(RewardsError):
    """A file that a reward needs is not there. `registry.create` adds the command that fetches it."""


class UnansweredError(RewardsError):
    """An endpoint answers, but gave no score for this picture. Other pictures may get one."""


@contextmanager
def naming(key: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn a ValueError or an OSError into a UserError of this kind that names the option it came from."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise kind(key, _reason(error)) from error


def _reason(error: Exception) -> str:
    """The error's text; of a system call, without the number of the error."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        fix = "give one that exists" if isinstance(error, FileNotFoundError) else "give one that can be used"
        return f"{error.filename}: {error.strerror}; {fix}"
    return str(error)


@contextmanager
def user_errors() -> Iterator[None]:
    """Report a UserError as one line on stderr and exit with its code. Other exceptions are bugs and pass through."""
    try:
        yield
    except UserError as error:
        print(f"error: {redacted(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(error.exit_code)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print each warning as one line, without the source line it comes from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {redacted(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
