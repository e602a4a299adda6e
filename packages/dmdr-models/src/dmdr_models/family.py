"""The small interface that hides which model family is at work.

A family knows how its networks are called, what its process is and how latents become pictures. It holds no roles:
generator, teacher and fake score are networks that the family's `load_network` made.

    family = dmdr_models.load("sit", "path/to/model")
    network = family.load_network()
    condition = family.condition([207, 360])
    prediction = family.predict(network, x_t, t, condition)
    images = family.decode(family.process.to_x0(x_t, prediction, t))
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from dmdr_core import FlowMatching, VariancePreserving
from torch import Tensor, nn

Condition = dict[str, Tensor]
"""What a network is conditioned on, by the name of the network's argument; every tensor starts with the batch."""

FAMILIES = {"sit": ("dmdr_models.sit.family", "SiT")}


class Family(Protocol):
    """One model family, loaded from a folder.

    Attributes:
        name: as in recipes, such as "sit".
        process: the noise process that the network was trained with.
        latent_shape: (C, H, W) of one latent.
        image_size: side of the decoded picture in pixels.
        num_classes: number of class labels, or None for a text-conditional family.
        lora_targets: the layers that the guidance network adapts unless a recipe says otherwise.
    """

    name: str
    process: FlowMatching | VariancePreserving
    latent_shape: tuple[int, int, int]
    image_size: int
    num_classes: int | None
    lora_targets: tuple[str, ...]

    def load_network(self, weights: str | Path | None = None) -> nn.Module:
        """A fresh copy of the base network, float32, in eval mode; or the one in the local folder `weights`.

        `weights` is what `save_pretrained` wrote, or the folder above it that holds it as `transformer/`. Raises
        FileNotFoundError for a missing folder or file, ValueError for another model or weights that do not fit.
        """

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        """The network's prediction, float32. `named` goes to the network: `lora_scale` of a `LoRANetwork`."""

    def condition(self, prompts: Sequence[Any]) -> Condition:
        """Class labels or texts to the network's condition. Raises ValueError for one that cannot be."""

    def null_condition(self, batch: int) -> Condition:
        """The condition of the unconditional prediction."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` to pictures `[B, 3, H', W']` in [0, 1]; gradients flow."""

    def encode(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] to the mean of their latents."""

    def save(self, network: nn.Module, folder: Path) -> None:
        """Write a network of this family, and what it needs to make pictures, as a folder that `load` opens."""

    def to(self, device: torch.device | str) -> "Family":
        """Move what the family holds besides the networks (the decoder)."""


def load(family: str, path: str | Path, **options: Any) -> Family:
    """Open a model folder (or hub name) of the given family; networks are loaded later, by `load_network`.

    Raises:
        ValueError: no such family, or the folder holds another model.
        FileNotFoundError: a file of the model is missing.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}; valid are {', '.join(FAMILIES)}")
    module, name = FAMILIES[family]
    return getattr(importlib.import_module(module), name)(path, **options)
