"""The rewards under the pictures of `dmdr-generate serve`, named on its command line as for `dmdr-score`.

The packages do not need each other, so dmdr-rewards is looked up by name. Its parser reads the command line.
"""

import argparse
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any

from dmdr_models.base.errors import UsageError


def add_rewards(parser: Any) -> None:
    """Add the options that name rewards, to a parser or a group of one."""
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="[COLUMN@]NAME[=CHECKPOINT]",
        help="write this score under every picture; needs dmdr-rewards; may be given several times",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME.KEY=VALUE",
        help="an option of one reward, such as clip.model=ViT-B-32",
    )


def read_rewards(args: argparse.Namespace) -> Sequence[Any]:
    """`--reward` and `--option` -> the `RewardArgument`s of dmdr-rewards; nothing is loaded.

    Raises:
        UsageError: dmdr-rewards is not installed, a text has another form, or a weight, which has no effect here.
    """
    if not (args.reward or args.option):
        return []
    try:
        parse = resolve_name("dmdr_rewards.score.reward_arguments:parse_rewards")
    except ImportError:
        raise UsageError("--reward needs dmdr-rewards: pip install dmdr-rewards") from None
    try:
        rewards: Sequence[Any] = parse(args.reward, args.option)
    except ValueError as error:
        raise UsageError(str(error)) from error
    for each in rewards:
        if each.weight != 1:
            raise UsageError(
                f"--reward {each.name} has the weight {each.weight:g}, but no total is shown: leave it out"
            )
    return rewards


def check_prompts(rewards: Sequence[Any], takes: str) -> None:
    """Refuse unknown rewards, and rewards that cannot read the prompts of the page.

    Args:
        takes: "labels" or "texts", as `Layout.takes`.

    Raises:
        UsageError: as said.
    """
    for each in rewards:
        try:
            prompt = resolve_name("dmdr_rewards:describe")(each.reward).prompt
        except ValueError as error:
            raise UsageError(f"--reward {each.name}: {error}") from error
        reads = {"text": "texts", "class_label": "labels"}.get(prompt, takes)
        if reads != takes:
            raise UsageError(f"--reward {each.name} reads {reads}, but the model takes {takes}: give another reward")


def load_rewards(rewards: Sequence[Any], device: str) -> dict[str, Any]:
    """Load the rewards, by the names of their columns.

    Raises:
        UsageError: a checkpoint or an option cannot be used.
    """
    found = {}
    for each in rewards:
        try:
            create = resolve_name("dmdr_rewards:create")
            found[each.name] = create(each.reward, each.checkpoint, device, **each.options)
        except (ValueError, OSError) as error:
            raise UsageError(f"--reward {each.name}: {error}") from error
    return found
