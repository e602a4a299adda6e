"""`--reward` and `--option`, as typed, and the rewards that they ask for."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dmdr_rewards.base.errors import UserError
from dmdr_rewards.base.safe_reading import from_json
from dmdr_rewards.base.secrets import ADVICE, secret_in

# NAME, NAME=PATH, and either with :WEIGHT. Only a number after the last colon is a weight: paths and URLs have colons.
_REWARD = re.compile(
    r"(?:(?P<column>[^=@]+)@)?(?P<name>[^=@]+?)(?:=(?P<checkpoint>.+?))?(?::(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))?"
)
_TAKEN = ("file_name", "prompt", "label", "total", "error", "note", "dtype")
"""Columns that every output has."""


@dataclass(frozen=True)
class RewardArgument:
    """One --reward: its column, checkpoint, weight in the total, and options of `dmdr_rewards.create`.

    name   of its column in the output
    kind   the reward's name in `dmdr_rewards.create`, if it is another
    """

    name: str
    checkpoint: str | None = None
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None

    @property
    def reward(self) -> str:
        """The reward's name in `dmdr_rewards.create`."""
        return self.kind or self.name


def parse_rewards(
    rewards: Sequence[str], options: Sequence[str], preprocess: str | None = None, flag: str = "--reward"
) -> list[RewardArgument]:
    """`[COLUMN@]NAME[=PATH][:WEIGHT]` and `NAME.KEY=VALUE`, as typed -> the rewards to load.

    preprocess  an option of every reward
    flag        what the rewards were typed after, for the messages

    A column has the reward's name unless COLUMN gives it another; options belong to a column. Values are read as JSON
    where they are JSON, otherwise as text. Raises UserError for a text of another form, two rewards of one column, a
    column that the output has anyway, an option of a reward that is not named, and a secret.
    """
    given: dict[str, dict[str, Any]] = {}
    for text in options:
        target, equals, value = text.partition("=")
        name, dot, key = target.rpartition(".")
        if not (equals and dot and name and key):
            raise UserError("--option", f"{text!r} is not NAME.KEY=VALUE, such as hpsv2.1.preprocess=dmdr")
        given.setdefault(name, {})[key] = _value(value)

    parsed: dict[str, RewardArgument] = {}
    for text in rewards:
        match = _REWARD.fullmatch(text)
        if match is None:
            raise UserError(flag, f"{text!r} is not NAME=CHECKPOINT or NAME=CHECKPOINT:WEIGHT")
        name = match["column"] or match["name"]
        if match["column"] and (name in _TAKEN or not re.fullmatch(r"[\w-]+", name)):
            raise UserError(
                flag, f"{name!r} cannot be a column: use letters, digits, - and _, none of {', '.join(_TAKEN)}"
            )
        if name in parsed:
            raise UserError(flag, f"{name} is given twice, but has one column: name each, as in old@{name}=CHECKPOINT")
        common = {} if preprocess is None else {"preprocess": preprocess}
        weight = 1.0 if match["weight"] is None else float(match["weight"])
        if secret := secret_in(given.get(name, {}), name) or secret_in(match["checkpoint"], name):
            raise UserError("--option" if name in given else flag, f"{secret} {ADVICE}")
        kind = match["name"] if match["column"] else None
        parsed[name] = RewardArgument(name, match["checkpoint"], weight, {**common, **given.pop(name, {})}, kind)
    if given:
        raise UserError(
            "--option", f"{next(iter(given))} is not among the rewards asked for: {', '.join(parsed) or 'none'}"
        )
    return list(parsed.values())


def _value(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        return text
