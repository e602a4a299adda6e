"""Frozen networks that stay in the CPU's memory and visit a device to compute."""

from typing import Any

import torch
from dmdr_core.base.devices import on_device, pinned
from torch import nn


def visit(network: nn.Module, device: torch.device, *inputs: Any, **named: Any) -> Any:
    """Call a network with copies of its weights on `device`, which are freed after the call; it stays on the CPU.

    For CUDA its weights move to pinned memory at the first visit, and the CPU does not wait for the copies.
    """
    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for tensor in own.values():
        tensor.data = pinned(tensor.data, device)
    return torch.func.functional_call(
        network, {name: on_device(tensor.detach(), device) for name, tensor in own.items()}, inputs, named
    )
