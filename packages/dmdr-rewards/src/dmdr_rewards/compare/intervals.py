"""Measures of two sets of features, each with an interval of 95 %.

A measure θ of sets of n and m pictures has the interval θ ± 1.96 s. Here s is the standard deviation of θ over random
halves of both sets, drawn without replacement: the delete-d jackknife of J. Shao and C. F. J. Wu, "A general theory for
jackknife variance estimation", 1989, with d = n / 2, whose factor (n − d) / d is 1. A bootstrap, which draws with
replacement, would put pictures twice into a set; nearest neighbours and covariances then say something else.

The interval holds the noise of a finite number of pictures, not the bias that this number causes: a Fréchet distance
grows as the sets get smaller, so compare it only between sets of equal sizes.
"""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from dmdr_rewards.compare.metrics import (
    Statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dmdr_rewards.compare.picture_sets import LEAST, NEIGHBOURS

_SUBSET = 1000
_SUBSETS = 100
_QUANTILE = 1.96
_BOUNDS = {
    "fd": (0.0, inf),
    "kid": (-inf, inf),  # its estimate is unbiased, so it is negative for about half of all equal distributions
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
    "density": (0.0, inf),
    "coverage": (0.0, 1.0),
    "is": (1.0, inf),
}


@dataclass(frozen=True)
class Estimate:
    """A measure and its interval of 95 %, whose ends are None if none was computed."""

    value: float
    low: float | None = None
    high: float | None = None


def estimates(
    pictures: Tensor,
    reference: Tensor | None,
    halves: int,
    device: str | torch.device = "cpu",
    logits: Tensor | None = None,
    statistics: Statistics | None = None,
) -> dict[str, Estimate]:
    """Each measure of the features Tensor[N, D] against those of the reference, Tensor[M, D], by its name.

    reference  None leaves only `fd`, against the statistics
    halves     random halves for the intervals; 0 computes no interval
    device     computes the distances between pictures; the CPU computes `fd` and `kid`, in float64
    logits     of the pictures' classes, Tensor[N, K], add the measure `is` of the pictures alone
    statistics  of the reference, in place of those of its features, for `fd`; they stay whole where sets are halved

    Raises ValueError for a set of fewer than `LEAST` pictures.
    """
    for each in (pictures, reference):
        if isinstance(each, Tensor) and len(each) < LEAST:
            raise ValueError(f"a set of {len(each)} pictures is too small: give at least {LEAST}")
    pictures = pictures.to(device)
    reference = None if reference is None else reference.to(device)
    whole = _measures(pictures, reference, _SUBSETS, logits, statistics)
    if halves == 0:
        return {name: Estimate(value) for name, value in whole.items()}
    draws = torch.Generator().manual_seed(0)
    parts = [_of_halves(pictures, reference, draws, logits, statistics) for _ in range(halves)]
    found = {}
    for name, value in whole.items():
        spread = _QUANTILE * float(torch.tensor([part[name] for part in parts], dtype=torch.float64).std())
        low, high = _BOUNDS[name]
        found[name] = Estimate(value, max(value - spread, low), min(value + spread, high))
    return found


def _of_halves(
    pictures: Tensor,
    reference: Tensor | None,
    draws: torch.Generator,
    logits: Tensor | None,
    statistics: Statistics | None,
) -> dict[str, float]:
    order = _half(pictures, draws)
    half, logits = pictures[order], None if logits is None else logits[order.cpu()]
    other = None if reference is None else reference[_half(reference, draws)]
    larger = len(half) if other is None else max(len(half), len(other))
    # Four times as many subsets as would hold every picture once: their own noise hardly widens the interval.
    return _measures(half, other, min(_SUBSETS, 4 * -(-larger // _SUBSET)), logits, statistics)


def _half(features: Tensor, draws: torch.Generator) -> Tensor:
    return torch.randperm(len(features), generator=draws)[: len(features) // 2].to(features.device)


def _measures(
    pictures: Tensor,
    reference: Tensor | None,
    subsets: int,
    logits: Tensor | None,
    statistics: Statistics | None,
) -> dict[str, float]:
    known = reference if statistics is None else statistics
    assert known is not None
    distance = frechet_distance(known, pictures)
    alone = {} if logits is None else {"is": inception_score(logits)}
    if reference is None:
        return {"fd": distance, **alone}
    if len(pictures) == len(reference) <= _SUBSET:  # every subset is the whole set
        subsets = 1
    precision, recall = precision_recall(reference, pictures, NEIGHBOURS["precision and recall"])
    density, coverage = density_coverage(reference, pictures, NEIGHBOURS["density and coverage"])
    return {
        "fd": distance,
        "kid": kernel_distance(reference, pictures, subsets, _SUBSET),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        **alone,
    }
