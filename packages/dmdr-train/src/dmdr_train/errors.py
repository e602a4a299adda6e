"""A user's mistake: one line that names the key, the value and the fix, and exit code 2."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2


class UserError(ValueError):
    """`UserError("optim.clip", "must be above 0, got -1")`; the key is a recipe key or a command-line option."""

    def __init__(self, key: str, message: str):
        super().__init__(f"{key}: {message}")


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
    """Turn a UserError into its one line on rank 0's stderr and exit code 2; any other exception is ours."""
    from dmdr_rewards.secrets import redacted

    try:
        yield
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {redacted(' '.join(str(error).split()))}", file=sys.stderr, flush=True)
        else:
            # Launchers kill every rank once one has ended: rank 0 must be the first, or its line is lost.
            time.sleep(5)
        sys.exit(EXIT_CODE)
