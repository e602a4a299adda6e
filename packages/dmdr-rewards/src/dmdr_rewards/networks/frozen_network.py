"""Networks with frozen weights: gradients reach their inputs, never their weights."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d)
"""Layers that compute with weights in autocast's precision, on every device."""


class FrozenNetwork:
    """A network with frozen weights, run under autocast in `dtype`.

    Results have the dtype `precision`: float64 if `dtype` is float64, for tests of gradients, and float32 otherwise, so
    that computations on the results (normalisation, dot products, sums of exponentials) are precise. So have the
    weights, except those of linear and convolution layers in half precision: autocast would round them at every call,
    so they are rounded once and take half the memory. The results are the same. The caller's autocast has no effect.
    This is not an nn.Module, so a trainer does not find its weights by accident.

    Raises ValueError for a dtype that is not in `DTYPES`.
    """

    def __init__(self, module: nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.precision = precision(dtype)
        self.module = module.to(self.device, self.precision).requires_grad_(False).eval()
        if self.half:
            for layer in self.module.modules():
                if isinstance(layer, ROUNDED):
                    layer.to(dtype)

    @property
    def half(self) -> bool:
        """Whether autocast is on."""
        return self.dtype in (torch.bfloat16, torch.float16)

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """Run the network on inputs on `device` -> Tensor of dtype `precision`."""
        with self.autocast():
            return self.module(*inputs, **named).to(self.precision)

    def autocast(self) -> torch.autocast:
        """The context in which the network runs."""
        return torch.autocast(self.device.type, dtype=self.dtype if self.half else None, enabled=self.half)


def precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and scores for a network that runs in `dtype`. Raises ValueError for an unknown dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: choose one of {', '.join(map(str, DTYPES))}")
    return torch.float64 if dtype == torch.float64 else torch.float32


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Gradient checkpointing: these blocks store only their input and run again in the backward pass."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
