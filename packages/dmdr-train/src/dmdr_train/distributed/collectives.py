"""What all processes call together: means, agreement, and rows of every process."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from dmdr_train.base.errors import StoppedError, UserError

Decision = TypeVar("Decision")


def mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """Each value averaged over all processes; every process must call it with the same keys."""
    if dist.get_world_size() == 1:
        return values
    stacked = torch.tensor(list(values.values()), dtype=torch.float64, device=_communicating())
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / dist.get_world_size()).tolist(), strict=True))


def anywhere(flag: bool) -> bool:
    """Whether any process says so; every process must ask."""
    return mean_over_processes({"flag": float(flag)})["flag"] > 0


def said_anywhere(text: str) -> str:
    """What the first of the processes with something to say says; empty if none has."""
    if not anywhere(bool(text)):
        return ""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, text)
    return next(filter(None, said))


def agreed(decide: Callable[[], Decision]) -> Decision:
    """What rank 0 decides, or does, on every process; every process must ask.

    Raises:
        UserError, StoppedError: rank 0's, everywhere.
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
    """Rows `[n, …]` of every process, `[world · n, …]` in rank order; every process must bring the same n."""
    if dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _communicating() -> torch.device:
    """Where the process group wants its tensors."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else get_accelerator().current_device_name())
