"""f-divergences as weights of distribution matching.

For a convex f with f(1) = 0, the f-divergence between the teacher's density p and the student's q is
``D_f = E_q[f(r)]`` with ``r = p / q``. Where the student's samples x move with its parameters, its gradient is

    ∇D_f = -E_q[h(r) (∇log p(x) - ∇log q(x)) · ∇x],   h(r) = f''(r) r²,

which is the gradient of the reverse KL with a weight for each sample (f-distill, arXiv 2502.15681).

=====================  =============================  ===========
divergence             f(r)                           h(r)
=====================  =============================  ===========
reverse_kl             -log r                         1
softened_reverse_kl    (r + 1) log((r + 1) / (2 r))   1 / (r + 1)
jensen_shannon         r log r - (r + 1) log((r+1)/2) r / (r + 1)
jeffreys               (r - 1) log r                  1 + r
forward_kl             r log r                        r
=====================  =============================  ===========
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.precision import working_dtype

DIVERGENCES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda log_ratio: torch.sigmoid(-log_ratio),
    "jensen_shannon": torch.sigmoid,
    "jeffreys": lambda log_ratio: 1 + log_ratio.exp(),
    "forward_kl": torch.exp,
}
"""h of each divergence, as a function of log r."""


@torch.no_grad()
def divergence_weight(divergence: str, log_ratio: Tensor, limit: float = 10.0) -> Tensor:
    """Return the weight of each sample in the gradient of an f-divergence.

    It is ``h(r) / h(1)``: where teacher and student agree, every divergence weights a sample by 1, as the reverse KL
    does everywhere. For `dmdr_core.dmd_loss`.

    Args:
        divergence: a name of the table in `dmdr_core.divergences`.
        log_ratio: ``[B]``, log p/q at each sample, for example the logit of a discriminator.
        limit: r is clamped to ``[1 / limit, limit]``, since an estimated ratio has outliers; more than 1.

    Returns:
        ``[B]``, float32 or better, detached.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an unknown divergence, or a limit of 1 or less.
    """
    checks.one_of("divergence", divergence, DIVERGENCES)
    checks.floating("log_ratio", log_ratio)
    checks.number("limit", limit)
    if limit <= 1:
        raise ValueError(f"limit = {limit:g} leaves no ratio but 1: give more than 1")
    h = DIVERGENCES[divergence]
    most = math.log(limit)
    clamped = log_ratio.to(working_dtype(log_ratio)).clamp(-most, most)
    return h(clamped) / h(torch.zeros_like(clamped))
