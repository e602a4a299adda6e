"""The errors of dmdr_train, and how a program ends on one: a line on stderr, and an exit code of `exit_codes`."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dmdr_train.base.exit_codes import EXIT_CODE


class DmdrTrainError(Exception):
    """The base of the errors that dmdr_train raises for its users."""


class UserError(DmdrTrainError, ValueError):
    """`UserError("optim.clip", "must be above 0, got -1")`; the key is a recipe key or a command-line option."""

    def __init__(self, key: str, message: str):
        super().__init__(key, message)

    def __str__(self) -> str:
        return ": ".join(self.args)


class StoppedError(DmdrTrainError):
    """Raised on every process when a run ends before its last step in a controlled way.

    Args:
        code: the exit code, one of `exit_codes`.
        text: the line to print.
        speaker: a rank that prints the line, besides the first process of each machine.
    """

    def __init__(self, code: int, text: str, speaker: int = 0):
        super().__init__(code, text, speaker)  # so that it can be pickled
        self.code = code
        self.speaker = speaker

    def __str__(self) -> str:
        return self.args[1]


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Add the recipe key to errors that another package raises about the user's files.

    Raises:
        UserError: for a ValueError, an OSError, or a damaged safetensors file.
    """
    from dmdr_models.base.errors import LengthError, SizeError
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except SizeError as error:  # whatever was being opened
        raise UserError("model.resolution", str(error)) from error
    except LengthError as error:
        raise UserError("model.max_tokens", str(error)) from error
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(key, str(error)) from error


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn UserError and StoppedError into one line on stderr and an exit code; other exceptions are bugs and pass.

    The first process of each machine and the speaker print the line. They end first, since launchers kill the other
    processes once one has ended.
    """
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", EXIT_CODE)
    except StoppedError as stop:
        _end(f"stopped: {stop}", stop.code, stop.speaker)
    except KeyboardInterrupt:
        _end("stopped: by Ctrl-C; complete files stay", 128 + signal.SIGINT)


def _end(line: str, code: int, speaker: int = 0) -> None:
    from dmdr_rewards.base.secrets import redacted

    if int(os.environ.get("LOCAL_RANK", "0")) == 0 or int(os.environ.get("RANK", "0")) == speaker:
        print(redacted(" ".join(line.split())), file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    sys.exit(code)
