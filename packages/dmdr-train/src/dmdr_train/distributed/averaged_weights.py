"""Exponential moving average of the generator; samples, evaluation and export use the averaged weights."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dmdr_train.distributed.deepspeed_internals import is_split, overwrite, shard
from dmdr_train.distributed.master_weights import Share, masters
from dmdr_train.distributed.reshard_zero import window


class Average:
    """θ̄ ← d · θ̄ + (1 − d) · θ, of the master weights θ. Each process averages the share that it holds.

    In update n = 1, 2, … of a run, d = min(decay, (1 + n) / (10 + n)). So the first updates do not hold on to the start
    values: with a constant decay of 0.9999, 30 updates would leave 99.7% of them in the average. With the ramp, the
    average follows the last tenth of a short run. Source: `tf.train.ExponentialMovingAverage(num_updates=n)`; torch-ema
    and diffusers' `EMAModel` do the same.

    If `decay` is None, nothing is averaged, and `applied` does not change the network.

    Args:
        engine: DeepSpeed engine of the network, or the network itself.

    Attributes:
        state: the share of each averaged parameter, flat and in float32.
    """

    def __init__(self, engine: Any, decay: float | None):
        self.engine = engine
        self.decay = decay
        found = masters(engine) if decay else {}
        self.state: dict[str, Tensor] = {name: share.values.float().clone() for name, share in found.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after a step into the average.

        Args:
            step: the number of steps so far, at least 1; it decides the ramp, so a resumed run continues it exactly.
        """
        if self.decay is None:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, share in masters(self.engine).items():
            self.state[name].lerp_(share.values.float(), 1 - decay)

    def shares(self) -> dict[str, Share]:
        """Return this process's shares of the averaged weights; of the trained weights, if nothing is averaged."""
        found = masters(self.engine)
        return {name: replace(share, values=self.state.get(name, share.values)) for name, share in found.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged weights inside the context, and restore the trained weights afterwards."""
        averaged = self.shares() if self.decay else {}
        trained = {name: shard(share.parameter).clone() for name, share in averaged.items()}
        for share in averaged.values():
            self._write(share, share.values if is_split(share.parameter) else share.whole())
        try:
            yield
        finally:
            for name, share in averaged.items():
                self._write(share, trained[name])

    @property
    def split(self) -> bool:
        """Whether every process holds a share of the average instead of all of it."""
        return any(share.split for share in masters(self.engine).values())

    def load(self, files: Sequence[Path]) -> None:
        """Restore the state from the files of any number of processes.

        Args:
            files: safetensors of `state`; if it was split, one file of every process, in the order of their ranks.
        """
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
            for name, share in self.shares().items() if self.decay else ():
                parts = [file.get_tensor(name).flatten() for file in opened]
                share.values.copy_(window(parts, share.start, share.values.numel()))

    @staticmethod
    @torch.no_grad()
    def _write(share: Share, values: Tensor) -> None:
        overwrite(share.parameter, values)
