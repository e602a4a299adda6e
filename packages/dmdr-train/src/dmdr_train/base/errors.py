"""How a run ends other than well: one line on stderr, and an exit code that says what to do.

| code | meaning |
|---|---|
| 2 | a mistake in the recipe, an option or a file; the line names key, value and fix |
| 4 | a rule of `watch` said so (action: stop); its state is saved |
| 65 | losses or gradients were not finite `run.max_skipped` times in a row; the state before that is saved |
| 69 | another process of the run ended or was not heard of for `run.timeout`; start again from the last checkpoint |
| 74 | a checkpoint could not be written, and the run was to stop for it, or ended with it |
| 75 | stopped by a signal, with its state saved; start again to go on |
| 76 | a reward failed, such as an endpoint that does not answer; the state is saved |

From 65 on they are those of BSD's sysexits: EX_DATAERR, EX_UNAVAILABLE, EX_IOERR, EX_TEMPFAIL, EX_PROTOCOL.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 2
EARLY_WARNING, NOT_FINITE, LOST, NOT_SAVED, STOPPED, UNANSWERED = 4, 65, 69, 74, 75, 76


class UserError(ValueError):
    """`UserError("optim.clip", "must be above 0, got -1")`; the key is a recipe key or a command-line option."""

    def __init__(self, key: str, message: str):
        super().__init__(key, message)

    def __str__(self) -> str:
        return ": ".join(self.args)


class StoppedError(Exception):
    """A run that ends before its last step, in good order and on every process.

    Args:
        code: the exit code, of those above.
        text: the line.
        speaker: a rank that prints it, beside the first on each machine.
    """

    def __init__(self, code: int, text: str, speaker: int = 0):
        super().__init__(code, text, speaker)  # so that it can be pickled
        self.code = code
        self.speaker = speaker

    def __str__(self) -> str:
        return self.args[1]


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
    """Turn UserError and StoppedError into one line on stderr and an exit code; what else is raised is ours.

    One process on each machine prints, and the speaker; they end first: launchers kill the others once one has ended.
    """
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", EXIT_CODE)
    except StoppedError as stop:
        _end(f"stopped: {stop}", stop.code, stop.speaker)
    except KeyboardInterrupt:
        _end("stopped: by Ctrl-C; what is whole stays", 128 + signal.SIGINT)


def _end(line: str, code: int, speaker: int = 0) -> None:
    from dmdr_rewards.base.secrets import redacted

    if int(os.environ.get("LOCAL_RANK", "0")) == 0 or int(os.environ.get("RANK", "0")) == speaker:
        print(redacted(" ".join(line.split())), file=sys.stderr, flush=True)
    else:
        time.sleep(5)
    sys.exit(code)
