"""Adversarial losses on the logits of a discriminator, which are high for real samples.

============  ====================================  ==================
              the discriminator's                   the generator's
============  ====================================  ==================
``logistic``  softplus(-real) + softplus(fake)      softplus(-fake)
``hinge``     relu(1 - real) + relu(1 + fake)       -fake
============  ====================================  ==================

The generator's logistic loss is the non-saturating one (Goodfellow et al., arXiv 1406.2661); the hinge losses are those
of arXiv 1705.02894. At its optimum, the logit of the logistic loss is log p/q, with p the density of real samples and q
the generator's; that of the hinge loss has its sign alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dmdr_core.base import checks

Losses = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]
LOSSES: Mapping[str, Losses] = {
    "logistic": (lambda real, fake: (F.softplus(-real) + F.softplus(fake)).mean(), lambda f: F.softplus(-f).mean()),
    "hinge": (lambda real, fake: (F.relu(1 - real) + F.relu(1 + fake)).mean(), lambda f: -f.mean()),
}
"""The losses of discriminator and generator, by name."""


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Return what a discriminator minimises, see `dmdr_core.adversarial`.

    Args:
        kind: ``logistic`` or ``hinge``.
        real: logits of real samples, ``[B]``.
        fake: logits of generated samples, ``[B]``.

    Returns:
        A scalar.

    Raises:
        TypeError: logits are no floating-point tensors.
        ValueError: an unknown kind, or shapes that differ.
    """
    checks.one_of("kind", kind, LOSSES)
    checks.samples(real=real, fake=fake)
    return LOSSES[kind][0](real, fake)


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """Return what the generator minimises, see `dmdr_core.adversarial`.

    Args:
        kind: ``logistic`` or ``hinge``.
        fake: logits of generated samples, ``[B]``, with gradient.

    Returns:
        A scalar.

    Raises:
        TypeError: logits are no floating-point tensor.
        ValueError: an unknown kind.
    """
    checks.one_of("kind", kind, LOSSES)
    checks.samples(fake=fake)
    return LOSSES[kind][1](fake)


def gradient_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """Return R1, ``½ mean |∂logit/∂input|²``, the mean taken over samples (Mescheder et al., arXiv 1801.04406).

    Args:
        logits: ``[B]``, of real samples; each depends on its own input alone.
        inputs: ``[B, ...]``, with gradient.

    Returns:
        A scalar that can be differentiated again.

    Raises:
        TypeError: an argument is no floating-point tensor.
        RuntimeError: the logits do not depend on the inputs.
    """
    checks.samples(logits=logits)
    checks.samples(inputs=inputs)
    (slope,) = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return 0.5 * slope.flatten(1).square().sum(dim=1).mean()
