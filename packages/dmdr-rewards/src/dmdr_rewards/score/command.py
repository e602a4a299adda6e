"""`dmdr-score IMAGES`: score pictures, and write the table, the summary and the page.

Names, options, pictures, prompts and the output are checked before any weights are loaded.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from dmdr_rewards.base.errors import StoppedError, UserError, naming
from dmdr_rewards.interface import registry
from dmdr_rewards.score.output import Columns, Key, Row, ScoreTable, by_key
from dmdr_rewards.score.prompts import require, with_prompts
from dmdr_rewards.score.provenance import provenance_of
from dmdr_rewards.score.reward_arguments import RewardArgument, parse_rewards
from dmdr_rewards.score.sources import Item, find
from dmdr_rewards.score.summary import print_summary


def score(options: Namespace) -> None:
    """Score the pictures that the output does not hold yet, and write output, summary and page.

    Raises UserError before anything is loaded, and StoppedError for a run that cannot continue.
    """
    rewards = parse_rewards(options.reward, options.option, options.preprocess)
    kinds = {reward.name: _kind_of_prompt(reward.reward) for reward in rewards}
    items = require(with_prompts(find(options.images, options.column), options.prompts, options.prompt), kinds)
    provenance = provenance_of(rewards, options.dtype)
    columns = Columns(tuple(kinds), (*provenance, *(f"{name}.preprocess" for name in kinds)))
    table = ScoreTable(Path(options.output), columns, options.overwrite)
    if options.html is not None and not Path(options.html).parent.is_dir():
        raise UserError("--html", f"{Path(options.html).parent}: no such folder")

    wanted = _by_key(items)
    table.refuse_unless_made_by(provenance)
    table.refuse_unless_among(wanted)
    if options.strict:
        table.done = {key: row for key, row in table.done.items() if row["error"] is None}
    missing = {key: item for key, item in wanted.items() if key not in table.done}
    speed = None
    if missing:
        from dmdr_rewards.score.scoring import score_missing

        speed = score_missing(rewards, missing, table, provenance, options)

    rows = [{**table.done[key], "total": _total(table.done[key], rewards)} for key in wanted]
    table.finish(rows)
    print_summary(table.path, rows, rewards, len(missing), speed)
    if options.html is not None:
        from dmdr_rewards.score.page import write_page

        names = [reward.name for reward in rewards]
        write_page(Path(options.html), table.path.name, rows, items, names, options.html_limit)
    if all(row["error"] for row in rows):
        raise StoppedError("IMAGES", f"not one of {len(rows)} pictures could be scored; first: {rows[0]['error']}")


def _kind_of_prompt(name: str) -> str:
    with naming("--reward"):
        return registry.describe(name).prompt


def _by_key(items: Sequence[Item]) -> dict[Key, Item]:
    rows = [{"file_name": item.file_name, "prompt": item.prompt, "label": item.label} for item in items]
    return dict(zip(by_key(rows), items, strict=True))


def _total(row: Row, rewards: Sequence[RewardArgument]) -> float | None:
    if any(row[reward.name] is None for reward in rewards):
        return None
    return sum(reward.weight * row[reward.name] for reward in rewards)
