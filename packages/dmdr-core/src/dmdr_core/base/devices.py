"""Copies to an accelerator without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return ``tensor`` on ``device``; the CPU does not wait for a copy from its own memory.

    torch keeps memory that is pinned for the copy until the device has read it.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    # On MPS the copy may happen after the memory has been freed.
    return pinned(tensor, device).to(device, non_blocking=device.type != "mps")


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor in memory from which ``device`` copies while the CPU goes on: for CUDA, pinned memory."""
    return tensor.pin_memory() if device.type == "cuda" else tensor
