"""Random draws from named generators.

A ``generator`` argument is one of

- ``None``: torch's global generator;
- one ``torch.Generator``: the whole batch is drawn from it;
- a sequence of ``torch.Generator``, one per sample: sample i depends on generator i alone, so a draw does not depend on
  how a batch is split over processes or accumulation steps.

Noise is drawn on the generator's own device in float32 (float64 if requested), then moved, without a wait for the
device, and cast. A run in bf16 therefore gets the rounded noise of the run in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dmdr_core.base import checks
from dmdr_core.base.devices import on_device
from dmdr_core.base.precision import working_dtype

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise.

    Args:
        shape: ``[B, ...]``.
        generator: see the head of this module.
        device: where the result goes; default: where it was drawn.
        dtype: of the result, a floating-point dtype.

    Returns:
        Noise of the given shape.

    Raises:
        TypeError: ``dtype`` is not floating-point, or ``generator`` is none of the kinds in the head of this module.
        ValueError: ``shape`` is empty, or the number of generators is not B.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype = {dtype} cannot hold noise: give a floating-point dtype")
    if len(shape) == 0:
        raise ValueError("shape = () has no batch dimension: give (B, ...)")
    drawn_as = working_dtype(torch.empty(0, dtype=dtype))

    def draw(batch: int, source: torch.Generator | None, where: torch.device | str | None) -> Tensor:
        return torch.randn(batch, *shape[1:], generator=source, device=where, dtype=drawn_as)

    return draw_batch(draw, shape[0], generator, device).to(dtype)


def draw_batch(
    draw: Callable[[int, torch.Generator | None, torch.device | str | None], Tensor],
    batch: int,
    generator: Generators,
    device: torch.device | str | None,
) -> Tensor:
    """Call ``draw(batch, generator, device)`` once, or once per sample, and put the result on ``device``."""
    if generator is None:
        return draw(batch, None, device)
    if isinstance(generator, torch.Generator):
        drawn = draw(batch, generator, generator.device)
    else:
        drawn = torch.cat([draw(1, one, one.device) for one in _one_per_sample(generator, batch)])
    return drawn if device is None else on_device(drawn, device)


def _one_per_sample(generators: Sequence[torch.Generator], batch: int) -> Sequence[torch.Generator]:
    if not isinstance(generators, Sequence) or not all(isinstance(one, torch.Generator) for one in generators):
        raise TypeError(
            f"generator is a {type(generators).__name__}: give None, a torch.Generator or a list of torch.Generator"
        )
    if len(generators) != batch:
        raise ValueError(f"generator lists {len(generators)} generators for {batch} samples: give one per sample")
    checks.count("batch", batch, 1)
    return generators
