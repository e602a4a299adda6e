"""A mistake in what was typed: one line that names the option, the value and the fix, and exit code 2.

Warnings are a line each as well.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from dmdr_rewards.base.secrets import redacted

USER_ERROR = 2
"""Exit code: the command cannot run as it was typed. Nothing was loaded or changed."""
STOPPED = 1
"""Exit code: the run began and could not go on. What was scored is kept, and the same command goes on from there."""


class UserError(ValueError):
    """`UserError("--prompts", "prompts.csv has no column prompt")`."""

    exit_code = USER_ERROR

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")


class StoppedError(UserError):
    """The run ends here, after it has begun."""

    exit_code = STOPPED


@contextmanager
def naming(key: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Give what a ValueError or an OSError refuses the option that it came from, as a UserError of this kind."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise kind(key, str(error)) from error


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into its one line on stderr and its exit code; any other exception is ours."""
    try:
        yield
    except UserError as error:
        print(f"error: {redacted(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(error.exit_code)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print a warning as its one line, without the place in our code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {redacted(str(message))}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
