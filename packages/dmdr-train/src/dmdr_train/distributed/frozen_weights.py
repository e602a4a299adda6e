"""Frozen copies of a network's trained weights, with which the network can predict again later."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def copy_weights(engine: Any) -> dict[str, Tensor]:
    """Return copies of the trained parameters, by their names, on their device and in the network's precision.

    Args:
        engine: DeepSpeed engine of the network, of a ZeRO stage below 3; or the network itself.
    """
    module = getattr(engine, "module", engine)
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@contextmanager
def with_weights(engine: Any, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the network compute with these weights inside the context, and with its own afterwards.

    No weight is copied: the parameters point to the others' memory meanwhile. A graph that exists before keeps the
    network's own weights, since its backward pass comes after the context.

    Args:
        engine: as for `copy_weights`.
        weights: what `copy_weights` returned.
    """
    parameters = dict(getattr(engine, "module", engine).named_parameters())
    own = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value
