"""How certain a mean is: bootstrap confidence intervals."""

import math

import torch
from torch import Tensor

from dmdr_train.base.random_draws import named_generator

RESAMPLES = 1000
Interval = tuple[float, float]


def bootstrap_interval(values: Tensor, seed: int, group: int = 1) -> Interval:
    """The 95% percentile interval of the mean of values `[N]`, from 1000 resamples; values that are NaN are left out.

    Args:
        group: values that follow each other belong to one prompt. Prompts are resampled, since the pictures of one
            prompt are not independent.
    """
    means = values.double().unflatten(0, (-1, group)).nanmean(dim=1)
    means = means[~means.isnan()]
    if len(means) < 2:
        return math.nan, math.nan
    draws = named_generator(seed, "bootstrap")
    found = [means[torch.randint(len(means), means.shape, generator=draws)].mean() for _ in range(RESAMPLES)]
    low, high = torch.stack(found).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def diversities(features: Tensor, group: int) -> Tensor:
    """Mean over the pairs of each prompt of ‖f_i − f_j‖ / √D, of features `[prompts · group, D]`, to `[prompts]`.

    The features are sorted by prompt. A prompt with a feature that is not finite has NaN.
    """
    groups = features.double().unflatten(0, (-1, group))
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum(dim=(1, 2)) / (group * (group - 1)) / features.shape[1] ** 0.5
