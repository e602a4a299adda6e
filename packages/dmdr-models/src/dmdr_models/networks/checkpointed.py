"""Gradient checkpointing of a network's blocks: all of them, or every n-th.

A checkpointed block keeps its inputs alone and computes its activations again in the backward pass (Chen et al. 2016,
https://arxiv.org/abs/1604.06174). Checkpointing every n-th block repeats and saves about 1 / n of what all blocks do.
"""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_blocks(network: Any, every: int = 1) -> None:
    """Checkpoint the first of every `every` blocks of a network, in the order in which a forward pass reaches them.

    No output and no gradient changes.

    Args:
        network: a diffusers model, or another network with `enable_gradient_checkpointing`, which takes the function
            that calls the blocks.

    Raises:
        ValueError: the network has no gradient checkpointing.
    """
    network.enable_gradient_checkpointing(EveryNth(every))


class EveryNth:
    """Calls a block, and checkpoints the call if the block is the first of `every`."""

    def __init__(self, every: int):
        self.every = every
        self._numbers: dict[nn.Module, int] = {}

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        number = self._numbers.setdefault(block, len(self._numbers))
        return block(*inputs) if number % self.every else checkpoint(block, *inputs, use_reentrant=False)
