"""One LoRA for each step of a few-step student, all on one frozen network."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmdr_models.networks.lora import LoRANetwork, register


class StepLoRAs(nn.Module):
    """A frozen network with an independent LoRA for each step of a grid (arXiv 2606.12575).

    Every row of a call has the LoRA of the step whose time is nearest to the row's own. Rows at different steps run
    apart, so a call costs as many passes as it has different steps, and no row adds to the gradient of another step.

    Args:
        steps: the LoRAs, in the order of the steps, on one network; each has the parameters of its own adapter alone
            (`shared=True`).
        times: `[N]`, what the network is given as `timestep` at each step.
        shared: this module registers the parameters of the adapters alone; see `LoRANetwork`.
    """

    def __init__(self, steps: Sequence[LoRANetwork], times: Tensor, shared: bool = False):
        super().__init__()
        self._steps = tuple(steps)  # in a tuple, torch does not register them
        self.times = times.float()
        self.network: nn.Module = nn.Module() if shared else steps[0].base
        if shared:
            for lora in steps:
                for path, parameter in lora.network.named_parameters():
                    register(self.network, path, parameter)

    @property
    def steps(self) -> tuple[LoRANetwork, ...]:
        """The LoRAs, in the order of the steps."""
        return self._steps

    @property
    def base(self) -> nn.Module:
        """The network that carries the adapters."""
        return self._steps[0].base

    @property
    def config(self) -> Any:
        return self.base.config

    def forward(self, sample: Tensor, timestep: Tensor, **named: Any) -> Any:
        """Call the network; a tuple of tensors or one tensor comes back, as from the network itself.

        Args:
            sample: `[B, …]`.
            timestep: `[B]`.
            named: tensors of B rows, dictionaries of them, or settings.
        """
        step = self.step_of(timestep)
        present = step.unique().tolist()
        if len(present) == 1:
            return self._steps[present[0]](sample, timestep=timestep, **named)
        groups = [(step == each).nonzero().flatten() for each in present]
        outputs = []
        for each, rows in zip(present, groups, strict=True):
            at = rows.to(sample.device)
            own = {name: _rows(value, at, len(sample)) for name, value in named.items()}
            outputs.append(self._steps[each](sample[at], timestep=timestep[at], **own))
        order = torch.cat(groups).argsort().to(sample.device)
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)[order]
        return tuple(torch.cat(parts)[order] for parts in zip(*outputs, strict=True))

    def step_of(self, timestep: Tensor) -> Tensor:
        """The step whose time is nearest to each of `timestep`: `[B]` int64 on the CPU.

        On the meta device, where times have no values, it is the first.
        """
        if timestep.is_meta:
            return torch.zeros(timestep.shape, dtype=torch.long, device="cpu")
        return (timestep.detach().cpu().float()[:, None] - self.times).abs().argmin(1)


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Some rows of a tensor of `batch` rows, or of each in a dictionary; other values as they are."""
    if isinstance(value, dict):
        return {name: _rows(each, rows, batch) for name, each in value.items()}
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value
