"""A process group of the device. Like NCCL's for CUDA, it refuses CPU tensors. gloo sends the messages."""

import functools
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from emulated.device import NAME, as_cpu, here, library

CPU = torch.device("cpu")
_gloo: dict[str, dist.ProcessGroup] = {}


@functools.cache
def install() -> None:
    """Register `emulated` as a backend of torch.distributed, and as the default backend of the device."""
    dist.Backend.register_backend(NAME, _backend, devices=[NAME])
    kernels = library("c10d")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, operation = name.partition("::")
        packet = getattr(torch.ops.c10d, operation, None) if namespace == "c10d" else None
        if packet is not None and _takes_tensors(packet.default):
            kernels.impl(operation, functools.partial(_by_gloo, packet.default), "PrivateUse1", allow_override=True)


def _backend(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _takes_tensors(operation: Any) -> bool:
    arguments = {argument.name: str(argument.type) for argument in operation._schema.arguments}
    return "process_group" in arguments and any("Tensor" in kind for kind in arguments.values())


def _by_gloo(operation: Any, *given: Any, **named: Any) -> Any:
    """Run an operation on tensors of the device as an operation on CPU tensors with the same memory."""
    names = [argument.name for argument in operation._schema.arguments]
    arguments = {**dict(zip(names, given, strict=False)), **named}
    group = dist.ProcessGroup.unbox(arguments["process_group"])
    moved = tree_map(lambda x: as_cpu(x) if here(x) else x, {**arguments, "process_group": None})
    return operation(**{**moved, "process_group": _on_cpu(group).boxed()})


def _on_cpu(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the group of CPU tensors that uses the same gloo backend."""
    if group.group_name not in _gloo:
        twin = dist.ProcessGroup(dist.HashStore(), group.rank(), group.size())
        twin._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, group._get_backend(torch.device(NAME)))
        _gloo[group.group_name] = twin
    return _gloo[group.group_name]
