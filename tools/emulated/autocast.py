"""`torch.autocast` on the device as on CUDA: products in half precision, norms and softmax in float32."""

import functools
from typing import Any

import torch
from torch import Tensor

from emulated.device import NAME, library, map_leaves

aten = torch.ops.aten

KEY = "AutocastPrivateUse1"
HALF = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
)
FULL = (
    aten.softmax.int,
    aten.log_softmax.int,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.exp.default,
    aten.log.default,
    aten.norm.Scalar,
    aten.linalg_vector_norm.default,
)


def install() -> None:
    """Make autocast cast the same operations as on CUDA and leave all others unchanged."""
    library("_").fallback(torch.library.fallthrough_kernel, KEY)
    kernels = library("aten")
    for operation in HALF:
        kernels.impl(operation, functools.partial(_cast, operation, None), KEY)
    for operation in FULL:
        kernels.impl(operation, functools.partial(_cast, operation, torch.float32), KEY)


def _cast(operation: Any, dtype: torch.dtype | None, *given: Any, **named: Any) -> Any:
    """Run an operation with floating-point tensors cast to `dtype`, or to autocast's precision if it is None."""
    dtype = dtype or torch.get_autocast_dtype(NAME)

    def cast(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if floats else value

    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return operation(*map_leaves(cast, given), **{name: map_leaves(cast, value) for name, value in named.items()})
