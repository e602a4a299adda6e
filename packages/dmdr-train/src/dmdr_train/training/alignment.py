"""Implicit distribution alignment: after an update of the generator, the fake score moves toward it.

Distribution matching needs a fake score that knows what the generator draws now. Between two of its own updates the
generator moves on, and the fake score can go with it at no cost in predictions: φ ← λ φ + (1 − λ) θ. Source: SenseFlow,
arXiv 2506.00523, where λ = 0.98.

Here the fake score is a LoRA on the teacher, of rank r and at scale s, so that φ = W + s·(alpha/r)·B·A in every adapted
layer, with W the teacher's weights. The generator's weights there are θ = W + D. Its change D is the product of its own
LoRA, of any rank, or, where it trains all weights, θ − W. The mean of φ and θ is the teacher plus

    T = λ · s·(alpha/r)·B·A + (1 − λ) · D,

whose rank can exceed r. The new B and A are the product of rank r nearest to T; see `nearest_factors`. Weights that
the fake score does not adapt stay the teacher's. The moments of its optimizer stay as they are.
"""

from typing import Any

import torch
from dmdr_models.networks.lora import LoRANetwork
from torch import Tensor

from dmdr_train.distributed.deepspeed_internals import gathered
from dmdr_train.distributed.master_weights import Share, masters

KEEP = 1e-4
"""The weight of A's own rows where T has fewer than r directions, relative to T's size."""


@torch.no_grad()
def align(fake_score: Any, generator: Any, decay: float, scale: float) -> None:
    """Move the fake score toward the generator, on the master weights. All processes must call this together.

    Args:
        fake_score: engine of a `LoRANetwork` (or the network itself).
        generator: engine of a network of the same layers, or of a LoRA on the same weights (or the network itself).
        decay: λ, the share of the fake score that stays.
        scale: s, the strength at which the LoRA is the fake score.
    """
    lora: LoRANetwork = getattr(fake_score, "module", fake_score)
    theirs = getattr(generator, "module", generator)
    own, others = masters(fake_score), masters(generator)
    strength = scale * lora.alpha / lora.rank
    for layer, (name_a, name_b) in lora.factors.items():
        a, b = own[name_a].whole(), own[name_b].whole()
        product = [decay * strength * b.flatten(1), a.flatten(1)]
        change = _change(lora, theirs, others, layer)
        if not change:
            own[name_b].replace(decay * b)
            continue
        new_b, new_a = nearest_factors(_sum(product, [(1 - decay) * change[0], *change[1:]]), a.flatten(1))
        own[name_a].replace(new_a.view(a.shape))
        own[name_b].replace((new_b / strength).view(b.shape))


def nearest_factors(product: list[Tensor], a: Tensor) -> tuple[Tensor, Tensor]:
    """Factors B `[m, r]` and A `[r, n]` of a matrix T of rank r or less, or of one near it of rank r.

    The rows of A span those of QᵀT, with Q an orthonormal basis of the columns of T·aᵀ: one step of subspace iteration
    (Halko et al., arXiv 0909.4061), begun at the rows of `a`. It is exact where T has rank r or less. Otherwise, where
    `a` comes from the step before and T has changed little, repeated steps lead to the r largest singular values.

    Of all A with these rows, the one nearest to `a` whose rows are orthogonal and equally long is returned, of the same
    norm as `a`: a learning rate is meant for the size of A, and the optimizer's moments for its directions.

    Args:
        product: matrices whose product is T, `[m, n]`.
        a: the A so far, `[r, n]`, not 0.
    """
    rank = min(a.shape)
    basis = torch.linalg.qr(torch.linalg.multi_dot([*product, a.mT])).Q
    within = torch.linalg.multi_dot([basis.mT, *product])
    size = within.norm()
    kept = torch.where(size > 0, KEEP * size, 1.0) / a.norm() * a
    rows = torch.linalg.svd(torch.cat([within, kept]), full_matrices=False).Vh[:rank]
    left, _, right = torch.linalg.svd(a @ rows.mT, full_matrices=False)
    length = a.norm() / rank**0.5
    new = length * (left @ right @ rows)
    return torch.linalg.multi_dot([*product, new.mT]) / length**2, new


def _change(lora: LoRANetwork, generator: Any, shares: dict[str, Share], layer: str) -> list[Tensor]:
    """The generator's change D of a layer, as matrices whose product it is; empty where there is none."""
    if isinstance(generator, LoRANetwork):
        if layer not in generator.factors:
            return []
        a, b = (shares[name].whole().flatten(1) for name in generator.factors[layer])
        return [generator.alpha / generator.rank * b.to(a.dtype), a]
    weight = lora.frozen_weight(layer)
    with gathered([weight]):
        return [shares[f"{layer}.weight"].whole().flatten(1) - weight.detach().flatten(1).float()]


def _sum(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """The sum of a product of two matrices and of one or two, as matrices whose product it is."""
    if len(second) == 1:
        return [first[0] @ first[1] + second[0]]
    return [torch.cat([first[0], second[0]], dim=1), torch.cat([first[1], second[1]])]
