"""The device itself: its memory, its checks, and its kernels, which call the CPU's."""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

NAME = "emulated"
CPU = torch.device("cpu")
NOTHING = nullcontext()
aten = torch.ops.aten

waits: Counter[str] = Counter()
"""How often the CPU would have had to wait for the device, by the name of the operation."""
waiting: Counter[str] = Counter()
"""The same by the module that waited, without torch's own modules."""

CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# These kernels make views and do not access memory, so they work for tensors of any device.
VIEWS = (aten.view.default, aten.as_strided.default, aten._reshape_alias.default, aten.unfold.default)
SET = aten.set_.source_Storage_storage_offset
# CUDA moves the indices of these to the tensor's device.
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Randomness:
    """The state of the device's own generator."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(0).get_state()

    def __enter__(self) -> None:
        self.cpus = torch.get_rng_state()
        torch.set_rng_state(self.state)

    def __exit__(self, *error: object) -> None:
        self.state = torch.get_rng_state()
        torch.set_rng_state(self.cpus)


own = Randomness()


class Module:
    """The module that torch expects as `torch.emulated`."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        own.state = torch.Generator().manual_seed(seed).get_state()

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return own.state.clone()

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        own.state = state.clone()

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def install() -> torch.device:
    """Register the device. This must happen before the first backward pass of any device; later calls do nothing."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from emulated import autocast  # which builds on this module

    _setup_privateuseone_for_python_backend(NAME, backend_module=Module)
    library("_").fallback(run, "PrivateUse1")
    kernels = library("aten")
    for view in VIEWS:
        kernels.impl(view, functools.partial(view.redispatch, CPU_KERNEL), "PrivateUse1")
    kernels.impl("set_.source_Storage_storage_offset", functools.partial(SET.redispatch, CPU_KERNEL), "PrivateUse1")
    kernels.impl("set_.source_Storage", _set_storage, "PrivateUse1")
    kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    kernels.impl("_local_scalar_dense", _local_scalar_dense, "PrivateUse1")
    # torch would compose it from other operations, which do not support every memory layout that this one does.
    kernels.impl("native_group_norm", functools.partial(run, aten.native_group_norm.default), "PrivateUse1")
    # For an unknown device, torch calls these two instead of the usual convolution operations.
    kernels.impl("convolution_overrideable", functools.partial(run, aten.convolution.default), "PrivateUse1")
    kernels.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
    torch.serialization.register_package(0, lambda storage: None, _restore)
    of_others = torch.UntypedStorage.clone
    torch.UntypedStorage.clone = lambda storage: (  # torch would allocate memory in a way that Python cannot provide
        _storage(storage.memory.clone()) if storage.device.type == NAME else of_others(storage)
    )
    autocast.install()
    return torch.device(NAME, 0)


_libraries: list[torch.library.Library] = []


def library(name: str) -> torch.library.Library:
    _libraries.append(torch.library.Library(name, "IMPL"))  # the kernels disappear with the library object
    return _libraries[-1]


# -- memory: a storage of the device is a storage of the CPU under another name


def here(value: Any) -> bool:
    """Return whether a value is a tensor of this device."""
    return isinstance(value, Tensor) and value.device.type == NAME


def as_cpu(tensor: Tensor) -> Tensor:
    """Return a CPU tensor with the same memory."""
    memory = getattr(tensor.untyped_storage(), "memory", None)
    if memory is None:  # a tensor without elements that torch itself has made
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


def as_device(tensor: Tensor) -> Tensor:
    """Return a tensor of the device with the memory of a CPU tensor."""
    return _rebind(torch._C._acc.create_empty_tensor([0], tensor.dtype), tensor)


def _rebind(ours: Tensor, tensor: Tensor) -> Tensor:
    storage = _storage(tensor.untyped_storage())
    return SET.redispatch(CPU_KERNEL, ours, storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def _storage(memory: torch.UntypedStorage) -> Any:
    """Return a storage of the device in the memory of a CPU storage."""
    storage = torch._C._construct_storage_from_data_pointer(memory.data_ptr(), torch.device(NAME, 0), memory.nbytes())
    storage.memory = memory  # keeps it alive for as long as the device's storage
    return storage


def _restore(storage: torch.UntypedStorage, location: str) -> Any:
    """Return the storage that `torch.load` puts on the device; None for other devices."""
    return _storage(storage) if location.startswith(NAME) else None


def _set_storage(tensor: Tensor, storage: Any) -> Tensor:
    return SET.redispatch(CPU_KERNEL, tensor, storage, 0, [storage.nbytes() // tensor.element_size()], [1])


def _empty(
    size: Any,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    return as_device(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Tensor:
    return as_device(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not here(target):
        wait("copy to the CPU")
    elif not here(source) and not non_blocking:
        wait("copy from the CPU")
    (as_cpu(target) if here(target) else target).copy_(as_cpu(source) if here(source) else source)
    return target


def _local_scalar_dense(tensor: Tensor) -> Any:
    wait("item")
    return as_cpu(tensor).item()


def wait(name: str) -> None:
    """Count a wait of the CPU for the device."""
    waits[name] += 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "emulated"):
        frame = frame.f_back
    waiting[frame.f_globals["__name__"]] += 1


# -- operations


class Operation:
    """Properties of a torch operation, read once from its declaration."""

    def __init__(self, op: Any):
        arguments = op._schema.arguments
        self.name = op._schema.name.removeprefix("aten::")
        self.positions = {a.name: i for i, a in enumerate(arguments)}
        self.written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self.takes_numbers = torch.Tag.pointwise in op.tags
        self.draws = torch.Tag.nondeterministic_seeded in op.tags
        self.waits = torch.Tag.dynamic_output_shape in op.tags or torch.Tag.data_dependent_output in op.tags


operation = functools.cache(Operation)


def run(op: Any, *args: Any, **named: Any) -> Any:
    """Run an operation on tensors of the device: check it like CUDA, and compute it on the CPU.

    Raises:
        RuntimeError: the operation mixes devices.
    """
    known = operation(op)

    def given(name: str) -> Any:
        position = known.positions[name]
        return args[position] if position < len(args) else named.get(name)

    outputs = {id(x): x for name in known.written for x in _leaves(given(name)) if isinstance(x, Tensor)}
    indices = [x for x in _leaves(given("indices")) if x is not None] if known.name in INDEXED else []
    check(known, [*_leaves(args), *_leaves(named.values())], indices, outputs)
    mirrors: dict[int, Tensor] = {}

    def mirror(value: Any) -> Any:
        if here(value):
            return mirrors.setdefault(id(value), as_cpu(value))
        return CPU if isinstance(value, torch.device) else value

    with own if known.draws else NOTHING:
        result = op(*map_leaves(mirror, args), **{name: map_leaves(mirror, value) for name, value in named.items()})
    ours: dict[int, Tensor] = {}
    for key, tensor in outputs.items():
        found = mirrors[key]
        ours[id(found)] = tensor
        if (found.size(), found.stride()) != (tensor.size(), tensor.stride()):  # torch has resized an output
            _rebind(tensor, found)
    return map_leaves(lambda x: ours[id(x)] if id(x) in ours else as_device(x) if isinstance(x, Tensor) else x, result)


def _leaves(values: Any) -> list[Any]:
    """Return the values inside an argument or a list of arguments; torch nests lists at most twice."""
    if isinstance(values, (Tensor, torch.Generator)) or not isinstance(values, Iterable) or isinstance(values, str):
        return [values]
    return [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else (value,))]


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """Return the value with `change` applied to every leaf."""
    return type(value)(map_leaves(change, v) for v in value) if isinstance(value, (list, tuple)) else change(value)


def check(op: Operation, leaves: list[Any], indices: list[Tensor], outputs: dict[int, Tensor]) -> None:
    """Refuse operations that CUDA refuses, and count operations for which CUDA waits.

    Args:
        leaves: all arguments.
        indices: the arguments that may lie on the CPU.
        outputs: the arguments that are written to, by `id`.

    Raises:
        RuntimeError: tensors of two devices, or a generator of another device.
    """
    free = {id(index) for index in indices}
    for leaf in leaves:
        if isinstance(leaf, torch.Generator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{leaf.device.type}'")
        if not isinstance(leaf, Tensor) or leaf.device.type == NAME or id(leaf) in free:
            continue
        is_number = leaf.dim() == 0 and leaf.device.type == "cpu" and id(leaf) not in outputs
        if not (is_number and op.takes_numbers):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {op.name} found at least two devices, "
                f"{NAME}:0 and {leaf.device}"
            )
    if op.waits and (op.name not in INDEXED or any(x.dtype in (torch.bool, torch.uint8) for x in indices)):
        wait(op.name)
    for index in indices:
        if not here(index):
            wait("copy from the CPU")


def _convolution_backward(slope: Tensor, images: Tensor, weight: Tensor, *options: Any) -> Any:
    return run(aten.convolution_backward.default, slope, images, weight, [slope.shape[1]], *options)
