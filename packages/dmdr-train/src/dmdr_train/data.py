"""What the model is conditioned on: class labels, drawn for every sample by its own generator."""

from typing import Any, Protocol

import torch

from dmdr_train.draws import Draws


class Prompts(Protocol):
    def draw(self, draws: Draws) -> list[Any]:
        """One prompt per sample of the micro-batch."""


class ClassLabels:
    """Labels drawn uniformly from `classes`."""

    def __init__(self, classes: list[int]):
        self.classes = classes

    def draw(self, draws: Draws) -> list[int]:
        chosen = [torch.randint(len(self.classes), (), generator=g).item() for g in draws.each("prompt")]
        return [self.classes[int(i)] for i in chosen]
