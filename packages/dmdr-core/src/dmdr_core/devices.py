"""Copies to an accelerator without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return ``tensor`` on ``device``; the CPU does not wait for a copy from its own memory.

    CUDA copies asynchronously only from pinned memory. torch keeps the pinned copy until the device has read it.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    # On MPS the copy may happen after the memory has been freed.
    return tensor.to(device, non_blocking=device.type != "mps")
