"""Collective operations, which every process must call: means, agreement, and rows of every process."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from dmdr_train.base.errors import StoppedError, UserError

Decision = TypeVar("Decision")


def mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """Average each value over all processes; every process must pass the same keys."""
    if dist.get_world_size() == 1:
        return values
    stacked = torch.tensor(list(values.values()), dtype=torch.float64, device=_communicating())
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / dist.get_world_size()).tolist(), strict=True))


def mean_tensor_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes; every process must pass the same shape."""
    if dist.get_world_size() == 1:
        return values
    total = values.to(_communicating(), copy=True)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).to(values.device)


def anywhere(flag: bool) -> bool:
    """Return whether `flag` is true on any process; every process must call this."""
    return mean_over_processes({"flag": float(flag)})["flag"] > 0


def said_anywhere(text: str) -> str:
    """Return the first text, in rank order, that is not empty; "" if all are empty. Every process must call this."""
    if not anywhere(bool(text)):
        return ""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, text)
    return next(filter(None, said))


def agreed(decide: Callable[[], Decision]) -> Decision:
    """Call `decide` on rank 0 and return its result on every process; every process must call this.

    Raises:
        UserError, StoppedError: as raised on rank 0, on every process.
    """
    if dist.get_world_size() == 1:
        return decide()
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = decide()
        except (UserError, StoppedError) as error:
            said[1] = error
    dist.broadcast_object_list(said, device=_communicating())
    if said[1] is not None:
        raise said[1]
    return said[0]


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows `[n, …]` of every process to `[world · n, …]` in rank order; n must be the same everywhere."""
    if dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _communicating() -> torch.device:
    """Return the device of tensors that the process group can communicate."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else get_accelerator().current_device_name())
