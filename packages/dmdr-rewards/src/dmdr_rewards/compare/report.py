"""The measures of `dmdr-score compare` as JSON and as a table."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dmdr_rewards.compare.extraction import PictureSet
from dmdr_rewards.compare.intervals import Estimate
from dmdr_rewards.compare.networks import FeatureNetwork
from dmdr_rewards.networks.checkpoint_files import sha256
from dmdr_rewards.networks.known_files import compared
from dmdr_rewards.score.reward_arguments import RewardArgument

_BETTER = {
    "fd": "0 is best",
    "kid": "0 is best",
    "precision": "A looks like B",
    "recall": "A covers B",
    "density": "A looks like B",
    "coverage": "A covers B",
    "is": "of A alone; higher is better",
}


def as_json(
    options: Namespace,
    arguments: Sequence[RewardArgument],
    networks: Mapping[str, FeatureNetwork],
    sets: tuple[PictureSet, PictureSet | None],
    found: Mapping[str, Mapping[str, Estimate]],
    statistics: bool,
) -> dict[str, Any]:
    """The sets, how the features were made, and each measure with its interval, as values that JSON can hold.

    statistics  whether `fd` was taken against statistics that B holds
    """
    return {
        "a": _set(options.a, sets[0]),
        "b": ({"statistics": options.b} if statistics else {}) | (_set(options.b, sets[1]) if sets[1] else {}),
        "halves": options.halves,
        "dtype": options.dtype,
        "features": {
            each.name: {
                "network": each.reward,
                "sha256": sha256(str(each.checkpoint)),
                "official": compared(each.reward, sha256(str(each.checkpoint))),
                "options": each.options,
                "preprocess": networks[each.name].preprocess,
                "width": sets[0].features[each.name].shape[1],
                "measures": {name: asdict(estimate) for name, estimate in found[each.name].items()},
            }
            for each in arguments
        },
    }


def print_table(result: Mapping[str, Any]) -> None:
    """A line per measure and a column per network: the value, and below the table how its interval was made."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    a, b = result["a"], result["b"]
    other = f"{b['images']} ({b['pictures']:,})" if "images" in b else b["statistics"]
    title = f"{a['images']} ({a['pictures']:,}) against {other}"
    columns = [each["measures"] for each in result["features"].values()]
    table = Table("measure", *map(escape, result["features"]), "", title=escape(title))
    for column in table.columns[1:-1]:
        column.justify = "right"
    for name, meaning in _BETTER.items():
        if any(name in measures for measures in columns):
            table.add_row(name, *(_cell(measures[name]) if name in measures else "" for measures in columns), meaning)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    if result["halves"]:
        console.print(f"intervals of 95 %, from {result['halves']} random halves of the pictures", markup=False)


def _set(images: str, found: PictureSet) -> dict[str, Any]:
    return {"images": images, "pictures": found.pictures, "left_out": found.left_out}


def _cell(estimate: Mapping[str, float | None]) -> str:
    value = f"{estimate['value']:.4g}"
    if estimate["low"] is None:
        return value
    return f"{value} [{estimate['low']:.4g}, {estimate['high']:.4g}]".replace("[", r"\[")
