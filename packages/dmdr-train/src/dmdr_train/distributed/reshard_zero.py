"""Divide ZeRO's state anew: from the processes that wrote a checkpoint to the processes that read it.

ZeRO concatenates the trained parameters, in float32 and with their moments, and gives every process a share: stages 1
and 2 divide the concatenated parameters, stage 3 divides every parameter by itself. `Cuts` describes the shares.
"""

import itertools
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmdr_train.distributed.deepspeed_internals import MOMENTS, WEIGHTS, layout


@dataclass(frozen=True)
class Cuts:
    """How an engine's trained parameters are divided.

    Args:
        pieces: numbers of elements of the tensors that are divided, in the order of their concatenation.
        flats: how many of the pieces each of DeepSpeed's flat tensors holds.
        align: the number of elements of each share is a multiple of this.
    """

    pieces: list[int]
    flats: list[int]
    align: int

    @classmethod
    def of(cls, engine: Any) -> "Cuts":
        """Return the cuts of a DeepSpeed engine with ZeRO 1, 2 or 3."""
        return cls(*layout(engine))

    def shares(self, world: int) -> list[int]:
        """Return the number of elements of each piece per process, for `world` processes, including padding zeros."""
        return [-(-size // (world * self.align)) * self.align for size in self.pieces]


def window(tensors: Sequence[Tensor], start: int, length: int) -> Tensor:
    """Return elements `start` to `start + length` of concatenated flat tensors, with zeros beyond their end."""
    found = torch.zeros(length, dtype=tensors[0].dtype)
    offset = 0
    for tensor in tensors:
        first, last = max(start, offset), min(start + length, offset + tensor.numel())
        if first < last:
            found[first - start : last - start] = tensor[first - offset : last - offset]
        offset += tensor.numel()
    return found


def cut(flats: Sequence[Sequence[Tensor]], cuts: Cuts, rank: int, world: int) -> list[Tensor]:
    """Return the flat tensors of process `rank` of `world`.

    Args:
        flats: the flat tensors of every process that wrote; each process's tensors are concatenated as `cuts` says.
    """
    shares, offset, ours = cuts.shares(len(flats)), 0, []
    for size, old, new in zip(cuts.pieces, shares, cuts.shares(world), strict=True):
        piece = [window(row, offset, old) for row in flats]
        ours.append(window([window(piece, 0, size)], rank * new, new))
        offset += old
    rest = iter(ours)
    return [torch.cat(list(itertools.islice(rest, count))) for count in cuts.flats]


def reshard(states: Sequence[dict[str, Any]], cuts: Cuts, rank: int, world: int) -> dict[str, Any]:
    """Return the state of DeepSpeed's optimizer as process `rank` of `world` would have saved it.

    Args:
        states: the saved states, in the order of their ranks.
    """
    ours = dict(states[0])
    for key in WEIGHTS:
        if key in ours:
            ours[key] = cut([state[key] for state in states], cuts, rank, world)
    for key in MOMENTS:
        if key in ours:
            ours[key] = _moments([state[key] for state in states], cuts, rank, world)
    return ours


def _moments(states: Sequence[dict[str, Any]], cuts: Cuts, rank: int, world: int) -> dict[str, Any]:
    """Do the same for the inner torch optimizer: tensors with one element per weight are divided, counters copied.

    All flat tensors are in one group of the optimizer, or each is in its own group.
    """
    groups = states[0]["param_groups"]
    saved = [i for group in groups for i in group["params"]]
    first = states[0]["state"].get(0, {})
    ours: dict[int, dict[str, Any]] = {i: {} for i in range(len(cuts.flats))}
    for name, value in first.items():
        rows = [[state["state"][i][name] for i in saved] for state in states]
        counts = not isinstance(value, Tensor) or value.dim() == 0
        flats = [deepcopy(value) for _ in ours] if counts else cut(rows, cuts, rank, world)
        for i, flat in enumerate(flats):
            ours[i][name] = flat
    held = [list(ours)] if len(groups) == 1 else [[i] for i in ours]
    groups = [{**group, "params": params} for group, params in zip(groups, held, strict=True)]
    return {"state": ours if first else {}, "param_groups": groups}
