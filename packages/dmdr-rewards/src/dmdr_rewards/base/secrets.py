"""Secrets stay in the environment: recipes, tables and logs may hold the name of a variable, never its value.

Three kinds of secrets are recognised: the value of an option with a secret's name, such as `api_key`; a user name,
password or key in a URL; and the value of an environment variable with a secret's name. `dmdr_models.base.secrets`
holds the redaction word for word: neither package needs the other. Imports no torch.
"""

import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

ADVICE = (
    "holds what looks like a secret, which outputs, logs and model cards would show; keep it in an environment "
    "variable and give the name of that variable, as in api_key_env"
)

_SECRET = r"(?:(?:\w+[_-])?(?:api|access|private|secret)[_-]?key|(?:(?:api|access|auth|bearer|hf|hub)[_-]?)?token"
_SECRET += r"|(?:\w+[_-])?(?:secret|password|passwd|passphrase|credentials?)|authorization)"
_IN_ADDRESS = rf"(?:{_SECRET}|(?:[\w-]+[_-])?(?:key|token|credential|sig(?:nature)?))"
_IN_URL = re.compile(rf"(?<=://)[^/\s@]+(?=@)|(?<=[?&;]){_IN_ADDRESS}=[^&;#\s]+", re.IGNORECASE)
_VARIABLE = re.compile(r".*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)", re.IGNORECASE)
_SHORTEST = 8  # of a variable's value: a shorter value may occur in a text by chance
_OPTION = re.compile(_SECRET, re.IGNORECASE)


def secret_in(node: Any, key: str = "") -> str | None:
    """The dotted key of the first value that looks like a secret, in nested dicts and lists; None if there is none."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            within = f"{key}.{name}" if key else str(name)
            if isinstance(value, str) and value and _OPTION.fullmatch(str(name)):
                return within
            if found := secret_in(value, within):
                return found
    elif isinstance(node, Sequence) and not isinstance(node, (str, bytes)):
        for place, value in enumerate(node):
            if found := secret_in(value, f"{key}.{place}" if key else str(place)):
                return found
    elif isinstance(node, str) and redacted(node) != node:
        return key
    return None


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
