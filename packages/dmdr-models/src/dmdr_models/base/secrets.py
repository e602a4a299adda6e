"""Secrets stay in the environment: error lines and tracebacks of `dmdr-generate` do not show them.

`dmdr_rewards.base.secrets` holds the same code word for word: neither package needs the other. Imports no torch.
"""

import os
import re
import sys
import traceback
from types import TracebackType

_SECRET = r"(?:(?:\w+[_-])?(?:api|access|private|secret)[_-]?key|(?:(?:api|access|auth|bearer|hf|hub)[_-]?)?token"
_SECRET += r"|(?:\w+[_-])?(?:secret|password|passwd|passphrase|credentials?)|authorization)"
_IN_ADDRESS = rf"(?:{_SECRET}|(?:[\w-]+[_-])?(?:key|token|credential|sig(?:nature)?))"
_IN_URL = re.compile(rf"(?<=://)[^/\s@]+(?=@)|(?<=[?&;]){_IN_ADDRESS}=[^&;#\s]+", re.IGNORECASE)
_VARIABLE = re.compile(r".*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)", re.IGNORECASE)
_SHORTEST = 8  # of a variable's value: a shorter value may occur in a text by chance


def redacted(text: str) -> str:
    """Replace secrets in URLs, and the values of secret environment variables, with ***."""
    text = _IN_URL.sub("***", text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.fullmatch(name):
            text = text.replace(value, "***")
    return text


def redact_tracebacks() -> None:
    """Redact secrets in the tracebacks of uncaught exceptions from now on."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    sys.excepthook = show
