"""Gradients at x0 of objectives that share a sample's pictures, with one backward pass through the decoder."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dmdr_train.training.sample import Sample


class Term(NamedTuple):
    """An objective's loss on a sample, without graph, and the loss's gradients.

    Attributes:
        at_x0: `[B, C, H, W]`, past the decoder; None if the objective uses nothing but the pictures.
        at_pictures: `[B, 3, H', W']`; None if the objective does not use the pictures.
    """

    name: str
    weight: float
    loss: Tensor
    at_x0: Tensor | None
    at_pictures: Tensor | None


class PictureGradients:
    """A decoder whose pictures begin a graph of their own.

    The gradients of several losses at the pictures can be summed before they are taken through the decoder. Pictures of
    a latent that an objective made of x0 stay in its graph.
    """

    def __init__(self, decode: Callable[[Sample], Tensor]):
        self.decode = decode
        self.decoded: Tensor | None = None
        self.pictures: Tensor | None = None

    def __call__(self, sample: Sample) -> Tensor:
        pictures = self.decode(sample)
        if not pictures.requires_grad or not sample.x0.is_leaf:  # of a target; or of what an objective made of x0
            return pictures
        self.decoded, self.pictures = pictures, pictures.detach().requires_grad_()
        return self.pictures.view_as(self.pictures)  # torch's counter of operations cannot follow a module's leaf input

    def term(self, name: str, weight: float, loss: Tensor, x0: Tensor) -> Term:
        """Take the gradients of a loss, and free its graph.

        Raises:
            RuntimeError: the loss depends neither on x0 nor on the pictures.
        """
        places = [x0] if self.pictures is None else [x0, self.pictures]
        found: list[Tensor | None] = [*torch.autograd.grad(loss, places, allow_unused=True), None]
        at_x0, at_pictures = found[:2]
        if at_x0 is None and at_pictures is None:
            raise RuntimeError(f"the loss of {name} depends neither on x0 nor on the pictures")
        return Term(name, weight, loss.detach(), at_x0, at_pictures)

    def at_x0(self, slopes: Sequence[Tensor], x0: Tensor) -> list[Tensor]:
        """Take gradients at the pictures to x0, with one backward pass each; the last one frees the decoder's graph."""
        found: list[Tensor] = []
        for i, slope in enumerate(slopes, 1):
            assert self.decoded is not None
            found += torch.autograd.grad(self.decoded, x0, slope, retain_graph=i < len(slopes))
        return found


def sum_at_x0(
    terms: Sequence[Term], decoder: PictureGradients, x0: Tensor, apart: bool, norms: bool
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Σ w_i · ∂L_i/∂x0 of the terms, and the gradients ∂L_i/∂x0 that were computed.

    Gradients at the pictures are summed before they pass the decoder, unless there is only one, or they are needed
    apart. The sum does not depend on `norms`.

    Args:
        apart: each gradient is needed in any case.
        norms: each gradient is wanted besides the sum.
    """
    pictured = [term for term in terms if term.at_pictures is not None]
    together = len(pictured) > 1 and not apart
    slopes = [term.at_pictures for term in pictured if term.at_pictures is not None]
    passed = slopes if norms or not together else []
    if together:
        weighted = [term.weight * slope for term, slope in zip(pictured, slopes, strict=True)]
        passed = [*passed, torch.stack(weighted).sum(dim=0)]
    through = decoder.at_x0(passed, x0)
    each = {} if together and not norms else dict(zip([term.name for term in pictured], through, strict=False))
    total = torch.zeros_like(x0)
    gradients: dict[str, Tensor] = {}
    for term in terms:
        whole = _sum(term.at_x0, each.get(term.name))
        if whole is not None and (term.at_pictures is None or term.name in each):
            gradients[term.name] = whole
        own = term.at_x0 if together else whole
        # An infinite loss poisons the update.
        total += (0.0 if own is None else term.weight * own) + 0 * term.loss
    return total + through[-1] if together else total, gradients


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
