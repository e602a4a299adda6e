"""Exponential moving average of the generator: what is sampled, evaluated and exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dmdr_train.engines import overwrite, shard


class Average:
    """θ̄ ← decay · θ̄ + (1 − decay) · θ, in float32, of the trainable parameters that this process holds.

    With `decay` None nothing is averaged, and `applied` leaves the network as it is.
    """

    def __init__(self, network: nn.Module, decay: float | None):
        self.decay = decay
        self.parameters = {n: p for n, p in network.named_parameters() if p.requires_grad} if decay else {}
        self.state: dict[str, Tensor] = {n: shard(p).detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, parameter in self.parameters.items():
            self.state[name].lerp_(shard(parameter).float(), 1 - self.decay)  # type: ignore[operator]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network with the averaged weights, and back."""
        trained = {name: shard(parameter).clone() for name, parameter in self.parameters.items()}
        self._write(self.state)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            overwrite(parameter, values[name])
