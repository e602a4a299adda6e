"""The run behind `dmdr-score IMAGES`, from what was typed to the table, the summary and the page.

Everything that can be refused is checked before weights are loaded: names, options, pictures, prompts, the output.
"""

import json
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmdr_rewards.base.errors import StoppedError, UserError, naming
from dmdr_rewards.base.safe_reading import from_json
from dmdr_rewards.base.secrets import ADVICE, secret_in
from dmdr_rewards.interface import registry
from dmdr_rewards.score.output import Columns, Key, Row, ScoreTable, by_key
from dmdr_rewards.score.sources import Item, find, require, with_prompts

# NAME, NAME=PATH, and either with :WEIGHT. Only a number behind the last colon is a weight: paths and URLs have colons.
_REWARD = re.compile(
    r"(?P<name>[^=]+?)(?:=(?P<checkpoint>.+?))?(?::(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))?"
)


# Options of a reward that asks an endpoint: how patiently, not what. A run may go on with others.
_PATIENCE = {"timeout", "retries", "backoff", "concurrency", "on_failure", "api_key_env"}


@dataclass(frozen=True)
class Asked:
    """One --reward: its name, checkpoint, weight in the total, and options of `dmdr_rewards.create`."""

    name: str
    checkpoint: str | None = None
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def score(options: Namespace) -> None:
    """Score the pictures that are not in the output yet, and write output, summary and page.

    Raises UserError before anything is loaded, StoppedError for a run that cannot go on.
    """
    asked = parse_rewards(options.reward, options.option, options.preprocess)
    kinds = {one.name: _describe(one.name) for one in asked}
    items = require(with_prompts(find(options.images), options.prompts, options.prompt), kinds)
    provenance = _provenance(asked, options.dtype)
    columns = Columns(tuple(kinds), (*provenance, *(f"{name}.preprocess" for name in kinds)))
    table = ScoreTable(Path(options.output), columns, options.overwrite)
    if options.html is not None and not Path(options.html).parent.is_dir():
        raise UserError("--html", f"{Path(options.html).parent}: no such folder")

    wanted = _wanted(items)
    table.refuse_unless_made_by(provenance)
    table.refuse_unless_among(wanted)
    if options.strict:
        table.done = {key: row for key, row in table.done.items() if row["error"] is None}
    missing = {key: item for key, item in wanted.items() if key not in table.done}
    speed = None
    if missing:
        from dmdr_rewards.score.scoring import score_missing

        speed = score_missing(asked, missing, table, provenance, options)

    rows = [{**table.done[key], "total": _total(table.done[key], asked)} for key in wanted]
    table.finish(rows)
    _print_summary(table.path, rows, asked, len(missing), speed)
    if options.html is not None:
        from dmdr_rewards.score.page import write_page

        write_page(Path(options.html), table.path.name, rows, items, [one.name for one in asked], options.html_limit)
    if all(row["error"] for row in rows):
        raise StoppedError("IMAGES", f"not one of {len(rows)} pictures could be scored; first: {rows[0]['error']}")


def parse_rewards(rewards: Sequence[str], options: Sequence[str], preprocess: str | None = None) -> list[Asked]:
    """`NAME[=PATH][:WEIGHT]` and `NAME.KEY=VALUE`, as typed -> what to load.

    preprocess  an option of every reward. Values are read as JSON where they are JSON, else as text.

    Raises UserError for anything else, for a reward named twice, and for an option of a reward that was not asked for.
    """
    given: dict[str, dict[str, Any]] = {}
    for text in options:
        target, equals, value = text.partition("=")
        name, dot, key = target.rpartition(".")
        if not (equals and dot and name and key):
            raise UserError("--option", f"{text!r} is not NAME.KEY=VALUE, such as hpsv2.1.preprocess=dmdr")
        given.setdefault(name, {})[key] = _value(value)

    asked: dict[str, Asked] = {}
    for text in rewards:
        match = _REWARD.fullmatch(text)
        if match is None:
            raise UserError("--reward", f"{text!r} is not NAME=CHECKPOINT or NAME=CHECKPOINT:WEIGHT")
        name = match["name"]
        if name in asked:
            raise UserError("--reward", f"{name} is given twice: its column can hold one; use a second output")
        common = {} if preprocess is None else {"preprocess": preprocess}
        weight = 1.0 if match["weight"] is None else float(match["weight"])
        if secret := secret_in(given.get(name, {}), name) or secret_in(match["checkpoint"], name):
            raise UserError("--option" if name in given else "--reward", f"{secret} {ADVICE}")
        asked[name] = Asked(name, match["checkpoint"], weight, {**common, **given.pop(name, {})})
    if given:
        raise UserError("--option", f"{next(iter(given))} is not among the rewards asked for: {', '.join(asked)}")
    return list(asked.values())


def _value(text: str) -> Any:
    try:
        return from_json(text)
    except ValueError:
        return text


def _describe(name: str) -> str:
    with naming("--reward"):
        return registry.describe(name).prompt


def _wanted(items: Sequence[Item]) -> dict[Key, Item]:
    rows = [{"file_name": item.file_name, "prompt": item.prompt, "label": item.label} for item in items]
    return dict(zip(by_key(rows), items, strict=True))


def _provenance(asked: Sequence[Asked], dtype: str) -> dict[str, str | None]:
    """How the scores are made, as far as it is known before the rewards are loaded; columns of the output.

    A file stands as its hash, wherever it lies; a checkpoint that is none is the name of a model elsewhere.
    """
    columns: dict[str, str | None] = {"dtype": dtype}
    for one in asked:
        options = {key: value for key, value in one.options.items() if key not in _PATIENCE}
        if options.get("preprocess") == "reference":
            del options["preprocess"]
        with naming(f"--reward {one.name}"):
            hashes = {key: _hash(value) for key, value in {"checkpoint": one.checkpoint, **options}.items()}
        columns[f"{one.name}.sha256"] = hashes.pop("checkpoint")
        if one.checkpoint is not None and columns[f"{one.name}.sha256"] is None:
            options["checkpoint"] = one.checkpoint
        options.update({key: value for key, value in hashes.items() if value is not None})
        if options:
            columns[f"{one.name}.options"] = json.dumps(options, sort_keys=True)
    return columns


def _hash(value: Any) -> str | None:
    if not (isinstance(value, str) and value and os.path.exists(value)):  # a long text is no path, and no error
        return None
    from dmdr_rewards.networks.checkpoint_files import sha256

    return sha256(value)


def _total(row: Row, asked: Sequence[Asked]) -> float | None:
    if any(row[one.name] is None for one in asked):
        return None
    return sum(one.weight * row[one.name] for one in asked)


def _print_summary(path: Path, rows: Sequence[Row], asked: Sequence[Asked], count: int, speed: float | None) -> None:
    import numpy as np
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("reward", "weight", "count", "mean", "std", "min", "max", title=escape(str(path)))
    for column in table.columns[1:]:
        column.justify = "right"
    named = [(one.name, f"{one.weight:g}") for one in asked] + [("total", "")] * (len(asked) > 1)
    for name, weight in named:
        values = np.array([row[name] for row in rows if row[name] is not None])
        numbers = (values.mean(), values.std(), values.min(), values.max()) if len(values) else [float("nan")] * 4
        table.add_row(name, weight, str(len(values)), *(f"{number:.5g}" for number in numbers))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)

    failed = [row for row in rows if row["error"]]
    now = f"{count} scored now" + ("" if speed is None else f", {speed:.3g} pictures/s")
    console.print(f"{len(rows)} picture{'s' * (len(rows) != 1)}, {len(failed)} with an error; {now}", markup=False)
    for row in failed[:3]:
        console.print(f"  {row['file_name']}: {row['error']}", markup=False)
    if len(failed) > 3:
        console.print(f"  … and {len(failed) - 3} more, in the column error")
