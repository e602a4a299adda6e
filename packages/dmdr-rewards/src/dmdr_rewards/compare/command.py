"""`dmdr-score compare A B`: measures of two sets of pictures, by the features of one or several networks.

Names, pictures and their numbers are checked before any weights are loaded.
"""

import json
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_rewards.base.atomic_files import write_whole
from dmdr_rewards.base.errors import StoppedError, UserError, naming
from dmdr_rewards.compare.picture_sets import find_set, warn_of_overlap
from dmdr_rewards.score.archives import PICTURES, arrays_in
from dmdr_rewards.score.reward_arguments import RewardArgument, parse_rewards

if TYPE_CHECKING:
    from dmdr_rewards.compare.metrics import Statistics
    from dmdr_rewards.compare.networks import FeatureNetwork


def compare(options: Namespace) -> None:
    """Compare the pictures A with the reference B, print the measures, and write them to the output.

    options  a, b, features, option, size, halves, device, dtype, batch_size, workers, json, output

    Raises UserError before anything is loaded, and StoppedError for pictures that cannot be compared.
    """
    arguments = _networks(options.features, options.option)
    if options.output is not None and not Path(options.output).absolute().parent.is_dir():
        raise UserError("-o", f"{options.output}: {Path(options.output).parent} is no folder; create it first")
    a = find_set("A", options.a, options.column)
    known = _arrays(options.b)
    b = [] if known and PICTURES not in known else find_set("B", options.b, options.column)
    warn_of_overlap(a, b)

    from dmdr_rewards.compare import extraction, report
    from dmdr_rewards.compare.intervals import estimates

    statistics = _statistics(options.b) if {"mu", "sigma"} & known or (known and not b) else None
    networks = _load(arguments, options)
    of_a = extraction.features(networks, a, options, "A")
    if statistics is not None:
        _refuse_other_width(statistics, of_a.features, options.b)
    of_b = extraction.features(networks, b, options, "B") if b else None
    _warn_of_few(of_a, None if statistics is not None else of_b)
    found = {}
    for name, network in networks.items():
        with naming(f"--features {name}", StoppedError):
            ours, theirs = of_a.features[name], None if of_b is None else of_b.features[name]
            logits = network.logits(ours)
            found[name] = estimates(ours, theirs, options.halves, network.tower.device, logits, statistics)
    result = report.as_json(options, arguments, networks, (of_a, of_b), found, statistics is not None)
    text = json.dumps(result, indent=2, allow_nan=False)
    if options.output is not None:
        with naming("-o", StoppedError):
            write_whole(Path(options.output), lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    print(text) if options.json else report.print_table(result)


def _networks(features: Sequence[str], options: Sequence[str]) -> list[RewardArgument]:
    parsed = parse_rewards(features, options, flag="--features")
    for each in parsed:
        if each.weight != 1:
            raise UserError("--features", f"{each.name} has the weight {each.weight:g}: measures are not summed")
    return parsed


def _arrays(path: str) -> set[str]:
    """The arrays of an .npz; empty for another file."""
    if not path.lower().endswith(".npz"):
        return set()
    with naming("B"):
        return arrays_in(Path(path))


def _statistics(path: str) -> "Statistics":
    from dmdr_rewards.compare.metrics import Statistics

    with naming("B"):
        return Statistics.from_npz(path)


def _load(arguments: Sequence[RewardArgument], options: Namespace) -> "dict[str, FeatureNetwork]":
    import torch

    from dmdr_rewards.compare.networks import load
    from dmdr_rewards.score.scoring import device_of

    device, networks = device_of(options.device), {}
    for each in arguments:
        with naming(f"--features {each.name}"):
            networks[each.name] = load(
                each.reward, each.checkpoint, device, getattr(torch, options.dtype), each.options, options.size
            )
    return networks


def _refuse_other_width(reference: "Statistics", features: Mapping[str, Any], path: str) -> None:
    for name, each in features.items():
        if each.shape[1] != len(reference.mean):
            raise UserError(
                "B", f"{path} has {len(reference.mean)} features and {name} has {each.shape[1]}: use their network"
            )


def _warn_of_few(*sets: Any) -> None:
    for name, each in zip("AB", sets, strict=True):
        for network, features in ({} if each is None else each.features).items():
            if len(features) <= features.shape[1]:
                warnings.warn(
                    f"{name} has {len(features)} pictures for the {features.shape[1]} features of {network}: FD is far "
                    "too high with so few; compare it only between sets of equal sizes, or look at KID",
                    stacklevel=2,
                )
