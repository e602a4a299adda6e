"""A pytest plugin that rounds products and similar operations in a way that no real CPU does, but any CPU may.

    pytest -p any_kernels --numprocesses 0 tests/models

Libraries choose a kernel by the operation, by the shapes, strides and alignment of its arguments, and by the number of
threads, and each kernel rounds in its own way. For many small shapes real kernels agree by chance; for which shapes
depends on the CPU. With this plugin they never agree: the last bits of every element of a result change by a number
that depends on all of these and on the element's position. Equal calls on memory with the same layout still give equal
bits. If two results pass `torch.equal` here, the same work was done twice, so they are equal on every CPU; all other
comparisons need a tolerance.

Separate processes compute as usual, so tests that start processes are left out.
"""

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LAST_BITS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROUND = (
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward", "_cdist_forward",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    "native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward",
    "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "gelu", "gelu_backward", "silu",
    "silu_backward", "sum", "mean", "var", "var_mean", "linalg_vector_norm", "upsample_bilinear2d",
    "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_adaptive_avg_pool2d", "avg_pool2d",
)  # fmt: skip
"""Operations that round more than once per element."""


class AnyKernels(TorchDispatchMode):
    """While this mode is active, the rounding of the operations in `ROUND` depends on their arguments."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ROUND:
            key = zlib.crc32(repr((str(function), [lie(each) for each in args], torch.get_num_threads())).encode())
            for each in result if isinstance(result, tuple | list) else [result]:
                if isinstance(each, Tensor) and each.dtype in LAST_BITS and each.device.type == "cpu" and each.numel():
                    disturb(each, key)
        return result


def lie(argument: Any) -> Any:
    """Return the memory layout of an argument, as far as a choice of kernel may depend on it."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.data_ptr() % 64
    return [lie(each) for each in argument] if isinstance(argument, list | tuple) else argument


def disturb(result: Tensor, key: int) -> None:
    """Change every element by up to two units in the last place; by one in half precision, where sums are float32.

    Integers and numbers of a few bits, such as ½, do not change, since their sums are exact.
    """
    places = torch.arange(key, key + result.numel()).mul_(2654435761).bitwise_right_shift_(16).remainder_(5).sub_(2)
    wide = torch.float64 if result.dtype == torch.float64 else torch.float32
    factor = 1 + places.to(wide).mul_(LAST_BITS[result.dtype]).reshape(result.shape)
    exact = result == result.round()
    if result.dtype == wide:
        exact |= result == result.bfloat16()
    result.copy_(torch.where(exact, result, result.to(wide) * factor))


def pytest_sessionstart() -> None:
    AnyKernels().__enter__()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    starting = [item for item in items if "python" in item.fixturenames]
    config.hook.pytest_deselected(items=starting)
    items[:] = [item for item in items if item not in starting]
