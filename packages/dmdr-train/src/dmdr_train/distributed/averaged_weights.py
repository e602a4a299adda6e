"""Exponential moving average of the generator; samples, evaluation and export use the averaged weights."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from dmdr_train.distributed.deepspeed_internals import is_split, overwrite, shard
from dmdr_train.distributed.reshard_zero import window


class Average:
    """θ̄ ← d · θ̄ + (1 − d) · θ, in float32, for the trainable parameters that this process holds.

    In update n = 1, 2, … of a run, d = min(decay, (1 + n) / (10 + n)). So the first updates do not hold on to the start
    values: with a constant decay of 0.9999, 30 updates would leave 99.7% of them in the average. With the ramp, the
    average follows the last tenth of a short run. Source: `tf.train.ExponentialMovingAverage(num_updates=n)`; torch-ema
    and diffusers' `EMAModel` do the same.

    If `decay` is None, nothing is averaged, and `applied` does not change the network.
    """

    def __init__(self, network: nn.Module, decay: float | None):
        self.decay = decay
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad} if decay else {}
        self.state: dict[str, Tensor] = {n: shard(p).detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after a step into the average.

        Args:
            step: the number of steps so far, at least 1; it decides the ramp, so a resumed run continues it exactly.
        """
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.state[name].lerp_(shard(parameter).float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged weights inside the context, and restore the trained weights afterwards."""
        trained = {name: shard(parameter).clone() for name, parameter in self.parameters.items()}
        self._write(self.state)
        try:
            yield
        finally:
            self._write(trained)

    @property
    def split(self) -> bool:
        """Whether every process holds a share of the parameters instead of all of them."""
        return any(is_split(parameter) for parameter in self.parameters.values())

    def load(self, files: Sequence[Path]) -> None:
        """Restore the state from the files of any number of processes.

        Args:
            files: safetensors of `state`; if it was split, one file of every process, in the order of their ranks.
        """
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            for name, value in self.state.items():
                parts = [file.get_tensor(name).flatten() for file in opened]
                start = dist.get_rank() * value.numel() if self.split else 0
                value.copy_(window(parts, start, value.numel()).view_as(value))

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            overwrite(parameter, values[name])
