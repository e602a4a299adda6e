"""The precision of arithmetic: float32, or float64 if an input is float64; never less, also with bf16 networks."""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: the widest of float32 and the dtypes of ``tensors``."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype
