"""From measurements of pictures to scores: means with intervals, and distances to real pictures. On one process."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from dmdr_rewards.compare.metrics import (
    Statistics,
    density_coverage,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from torch import Tensor

from dmdr_train.evaluation.finished_batches import Rows
from dmdr_train.evaluation.intervals import bootstrap_interval, diversities

JUDGED = "judged/"


class Measured:
    """Measurements of a set of pictures, on the CPU."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.finite = rows["finite"] > 0

    def __getitem__(self, name: str) -> Tensor:
        """The measurements of the pictures that are finite, `[n, …]`."""
        return self.rows[name][self.finite]

    @property
    def judged(self) -> dict[str, Tensor]:
        """The numbers of accuracy and rewards, `[N]` each, by name."""
        return {name.removeprefix(JUDGED): rows for name, rows in self.rows.items() if name.startswith(JUDGED)}


def describe(made: Measured, sets: Mapping[str, Tensor], group: int, seed: int) -> dict[str, Any]:
    """The scores that need no other pictures, under the names of `Scores`: means with intervals, and what is broken.

    Args:
        sets: which pictures belong to each set of prompts, `[N]` bool.
        group: pictures of each prompt.
    """
    judged = {name: values.double() for name, values in made.judged.items()}
    for name, values in list(judged.items()):
        judged |= {f"{name}, {each}": values.masked_fill(~mask, torch.nan) for each, mask in sets.items()}
    means = {name: values.nanmean().item() for name, values in judged.items()}
    intervals = {name: bootstrap_interval(values, seed, group) for name, values in judged.items()}
    found: dict[str, Any] = {"accuracy": means.pop("accuracy", None), "more": means, "intervals": intervals}
    if group > 1:
        values = diversities(made.rows["features"], group)
        found["diversity"] = values.nanmean().item()
        intervals["diversity"] = bootstrap_interval(values, seed)
    if "seconds" in made.rows:
        found["seconds"] = made.rows["seconds"].median().item()  # the first batch also warms up
    return {**found, "broken": (~made.finite).nonzero().flatten().tolist()}


def compare(
    real: Measured | None, statistics: Statistics | None, made: Measured, device: torch.device
) -> dict[str, Any]:
    """The distances to real pictures.

    Args:
        real: the reference set.
        statistics: for the Fréchet distance, in place of those of the reference set.
        device: where the many distances are computed.
    """
    found: dict[str, Any] = {}
    known = real["features"] if statistics is None and real is not None else statistics
    if known is not None:
        found["frechet"] = or_nan(lambda: frechet_distance(known, made["features"]))
    if real is not None:
        theirs, ours = (each["features"].to(device) for each in (real, made))
        found["kernel"] = or_nan(lambda: kernel_distance(theirs, ours))
        found["frechet_pixels"] = or_nan(lambda: frechet_distance(real["pixels"], made["pixels"]))
        found["precision"], found["recall"] = or_nan(lambda: precision_recall(theirs, ours), 2)
        found["density"], found["coverage"] = or_nan(lambda: density_coverage(theirs, ours), 2)
    return found


def or_nan(measure: Callable[[], Any], count: int = 1) -> Any:
    """The result, or NaN if too many pictures are not finite for it."""
    try:
        return measure()
    except ValueError:
        return math.nan if count == 1 else (math.nan,) * count
