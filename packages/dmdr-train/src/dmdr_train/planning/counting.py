"""Counting what a computation costs: operations, and bytes that are allocated while it runs.

Both are counted on torch's meta device too, where tensors have shapes and no values. There a network of any size takes
no memory, and autograd keeps and frees the same tensors as on a GPU.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dmdr_train.base.errors import UserError

FUSED_WIDTH = 256
"""The widest attention head that flash attention computes; a wider one goes to the memory-efficient kernel."""


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _cpu_attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of operations, which here counts attention on a CPU as well, with the formula of GPUs."""
    formulas = {CPU_ATTENTION: _cpu_attention, CPU_ATTENTION_BACKWARD: _cpu_attention_backward}
    return FlopCounterMode(display=False, custom_mapping=formulas)


@dataclass(frozen=True)
class Cost:
    """What a call costs.

    Attributes:
        forward: operations of the forward pass.
        backward: operations of the backward pass, with what gradient checkpointing repeats.
        peak_forward: the most bytes that are allocated at once in the forward pass, beside weights and inputs.
        held: bytes that wait for the backward pass, and the output.
        peak: the most bytes in either pass, without the gradients of weights.
        kernels: the kernels that the forward pass launches on a GPU, whatever the number of samples.
        backward_kernels: the kernels that the backward pass launches.
    """

    forward: int
    backward: int = 0
    peak_forward: int = 0
    held: int = 0
    peak: int = 0
    kernels: int = 0
    backward_kernels: int = 0

    @property
    def both(self) -> int:
        """Operations of the forward and the backward pass."""
        return self.forward + self.backward

    @property
    def both_kernels(self) -> int:
        """Kernels of the forward and the backward pass."""
        return self.kernels + self.backward_kernels


LARGEST = ("peak_forward", "held", "peak", "kernels", "backward_kernels")
"""Of these, `mean_cost` takes the largest: memory must suffice for every size, and kernels hardly depend on it."""


def mean_cost(parts: Sequence[tuple[float, Cost]]) -> Cost:
    """The mean operations of calls by their shares, and the most bytes and kernels of any of them."""
    return Cost(
        round(sum(share * part.forward for share, part in parts)),
        round(sum(share * part.backward for share, part in parts)),
        *(max(getattr(part, name) for _, part in parts) for name in LARGEST),
    )


def cost(call: Callable[[], Tensor], parameters: Any = (), backward: bool = False) -> Cost:
    """Count a call on the meta device.

    Args:
        call: returns the output.
        parameters: the weights that are trained; their gradients are freed as soon as they are there, and not counted.
        backward: also the backward pass, from a gradient at the output.
    """
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in parameters if p.requires_grad and backward]
    meter = Meter()
    fused = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
    with fused, meter, torch.set_grad_enabled(backward):
        output = call()
        forward, peak_forward, held, kernels = meter.flops, meter.peak, meter.now, meter.kernels
        if backward:
            output.backward(torch.empty_like(output))
        del output
    for hook in hooks:
        hook.remove()
    return Cost(forward, meter.flops - forward, peak_forward, held, meter.peak, kernels, meter.kernels - kernels)


@contextmanager
def failing_as(key: str, what: str) -> Iterator[None]:
    """Name what could not be counted: a plug-in's model may fail in any way where tensors have no values.

    Raises:
        UserError: for every exception; names `key`, and says what failed and how.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(key, f"{what} cannot be counted without weights ({why}); a run needs no plan") from error


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


WITHOUT_KERNEL = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.new_empty,
    torch.ops.aten._unsafe_view,
}
"""Operations that allocate a tensor, compute nothing, and are not declared as views."""


class Meter(TorchDispatchMode):
    """Counts operations by torch's formulas, and follows the bytes of all tensors that are made in this context.

    Attributes:
        flops: operations so far.
        now: bytes at present.
        peak: the most so far.
        kernels: computations so far, each of which is about one kernel on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = self.kernels = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # the question whether a mask masks nothing
        result = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        if not func.is_view:
            self.kernels += func._overloadpacket not in WITHOUT_KERNEL
            given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    self._see(tensor.untyped_storage(), given)
        return result

    def _see(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in given or name in self._known:
            return
        self._known.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, name, size)

    def _freed(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *_: Any, **__: Any) -> Tensor:
    """Attention on the meta device with the kernels of a GPU, which do not store the matrix of scores.

    torch itself would choose the kernel that stores it.
    """
    kernels = torch.ops.aten
    if attn_mask is None and query.shape[-1] <= FUSED_WIDTH and query.dtype != torch.float32:
        return kernels._scaled_dot_product_flash_attention(query, key, value)[0]
    needed = any(tensor.requires_grad for tensor in (query, key, value))
    return kernels._scaled_dot_product_efficient_attention(query, key, value, None, needed)[0]


def bytes_of(*modules: nn.Module) -> int:
    """The bytes of all parameters and buffers of modules, each counted once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def count_of(*modules: nn.Module) -> int:
    """The number of the parameters of modules, each counted once."""
    parameters = {id(p): p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in parameters.values())
