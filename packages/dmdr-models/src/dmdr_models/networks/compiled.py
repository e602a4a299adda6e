"""Compiling the repeated blocks of a network with torch.compile, each by itself.

A block of many is compiled once and serves them all, so the time to compile does not grow with the depth ("regional
compilation", https://docs.pytorch.org/tutorials/recipes/regional_compilation.html).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

GRAPHS = 64
"""How many graphs torch may keep of all blocks; it would run further ones without a compiler."""


def compile_blocks(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the blocks of a network in place; they are compiled at their first call.

    Names of modules and weights stay as they are. Gradient checkpointing and LoRAs may be switched on before or after.
    Sizes are symbols from the start: a graph serves every number of rows from 2 on, and every size, except where two
    sizes of the first call are equal by chance, such as the numbers of tokens and of channels. One more graph is
    made for a single row, for each adapter and for none, with and without gradients, and for blocks of another
    structure. LoRA scales are tensors, so a new scale needs no new graph. torch's limit of graphs is raised to `GRAPHS`
    for the whole process.

    Args:
        network: a network whose class names its blocks in `_repeated_blocks` or `_no_split_modules`, as diffusers' do.
        backend: of torch.compile.

    Raises:
        ValueError: the network has no such blocks.
    """
    names = getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ()
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(network).__name__} names no repeated blocks, which could be compiled; use false")
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for block in blocks:
        block.compile(backend=backend, dynamic=True)
