"""Master weights: the float32 copies of the trained parameters, which the optimizer updates.

In half precision, a small step changes the master copy and often not the copy that the network computes with. What
outlives the run is therefore the master copy: saved weights, averages, the start of the next run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmdr_train.distributed.deepspeed_internals import full_shape, full_size, is_split, master_parts, overwrite


@dataclass(frozen=True)
class Share:
    """The part of a tensor that this process holds.

    Attributes:
        values: flat, in float32. Of master weights, they share the memory of the optimizer.
        start: position of the part in the flattened tensor.
        parameter: the parameter that the tensor belongs to, and has the shape of.
        split: whether other processes hold the rest. Otherwise every process holds all of it.
    """

    values: Tensor
    start: int
    parameter: nn.Parameter
    split: bool

    def whole(self) -> Tensor:
        """Return the whole tensor, on the device of the parameter. All processes must call this together."""
        flat = torch.zeros(full_size(self.parameter), device=self.parameter.device)
        self._part_of(flat).copy_(self.values)
        if self.split:
            dist.all_reduce(flat)
        return flat.view(full_shape(self.parameter))

    @torch.no_grad()
    def take(self, whole: Tensor) -> None:
        """Overwrite the part with that of a whole tensor."""
        self.values.copy_(self._part_of(whole.flatten()))

    def replace(self, whole: Tensor) -> None:
        """Overwrite the part of a master weight with that of a whole tensor, and so the network's own copy."""
        self.take(whole)
        overwrite(self.parameter, self.values if is_split(self.parameter) else whole)

    def _part_of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.values.numel()]


def masters(engine: Any) -> dict[str, Share]:
    """Return this process's shares of the master weights, by the names of the parameters.

    Args:
        engine: DeepSpeed engine; or a module, whose parameters are their own master weights.
    """
    module = getattr(engine, "module", engine)
    split = module is not engine and engine.zero_optimization_stage() > 0
    parameters = dict(module.named_parameters())
    parts = master_parts(engine)
    return {name: Share(values, start, parameters[name], split) for name, (start, values) in parts.items()}


def start_masters(engine: Any, weights: Mapping[str, Tensor]) -> None:
    """Overwrite the master weights that `weights` names; each of its tensors is whole."""
    shares = masters(engine)
    for name, whole in weights.items():
        shares[name].take(whole)
