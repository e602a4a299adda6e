"""Networks that score: gradients reach what enters them, never their weights."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FrozenNetwork:
    """A network with frozen weights, run under autocast in `dtype`.

    Weights and results have `precision`: float64 with `dtype` float64, for tests of gradients, and float32 otherwise,
    so that whatever follows the network (normalisation, dot products, sums of exponentials) is exact enough. The
    caller's own autocast has no say. It is not an nn.Module, so a trainer cannot pick its weights up by accident.

    Raises ValueError for a dtype that is not one of `DTYPES`.
    """

    def __init__(self, module: nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.precision = precision(dtype)
        self.module = module.to(self.device, self.precision).requires_grad_(False).eval()

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        """Run the network on inputs that lie on `device` -> Tensor of `precision`."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=half):
            return self.module(*inputs, **named).to(self.precision)


def precision(dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and scores that goes with the network's `dtype`. Raises ValueError for one unknown."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}: choose one of {', '.join(map(str, DTYPES))}")
    return torch.float64 if dtype == torch.float64 else torch.float32


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Gradient checkpointing: these blocks keep only their input and run again in the backward pass. Values stay."""
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
