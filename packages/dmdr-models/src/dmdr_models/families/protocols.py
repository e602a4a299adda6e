"""The small interface that hides which model family is at work.

A family knows how its networks are called, what its process is and how latents become pictures. It holds no roles:
generator, teacher and fake score are networks that the family's `load_network` made.

    family = dmdr_models.load("sit", "path/to/model")
    network = family.load_network()
    condition = family.condition([207, 360])
    prediction = family.predict(network, x_t, t, condition)
    images = family.decode(family.process.to_x0(x_t, prediction, t))

Opening a family reads configs alone; networks, decoder and text encoders are read when they are first used.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from dmdr_core import FlowMatching, Grid, VariancePreserving
from torch import Tensor, nn

if TYPE_CHECKING:
    from dmdr_models.networks.lora import LoRANetwork

Condition = dict[str, Tensor]
"""What a network is conditioned on, by the name of the network's argument; every tensor starts with the batch."""

FAMILIES = {
    "sit": ("dmdr_models.sit.family", "SiT"),
    "sd3": ("dmdr_models.sd3.family", "SD3"),
    "sdxl": ("dmdr_models.sdxl.family", "SDXL"),
}


class Family(Protocol):
    """One model family, loaded from a folder.

    Attributes:
        name: as in recipes, such as "sit".
        network_part: the folder of the network in a model, such as "transformer".
        process: the noise process that the network was trained with.
        latent_shape: (C, H, W) of one latent.
        image_size: side of the decoded picture in pixels.
        num_classes: number of class labels, or None for a text-conditional family.
        shift: of the model's own step grid.
        vae: the decoder, an AutoencoderKL or an AutoencoderTiny; opened when it is first used.
        lora_targets: the layers that the guidance network adapts unless a recipe says otherwise.
        keeps_lora: whether stock diffusers can put a student's LoRA on the model; it is merged otherwise.
        max_tokens: length of the longest sequence of a text, or None where there is no choice.
        text: of a text-conditional family, prompts to what the condition holds of them. It may be replaced, by a cache
            of embeddings for example; its result may lie on any device.
    """

    name: str
    network_part: str
    process: FlowMatching | VariancePreserving
    latent_shape: tuple[int, int, int]
    image_size: int
    num_classes: int | None
    shift: float
    vae: Any
    lora_targets: tuple[str, ...]
    keeps_lora: bool
    max_tokens: int | None
    text: Callable[[Sequence[str]], Condition]

    def load_network(self, weights: str | Path | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """A fresh copy of the base network in eval mode, or the one in the folder or file `weights`.

        It comes in `dtype`, by default the family's. `weights` is what `save_pretrained` wrote, the folder above it
        that holds it as `network_part`, or the file of a state dict (`.safetensors`, or `.bin`, `.pt` and `.pth`, which
        are read without running any code). Raises FileNotFoundError for a missing folder or file, ValueError for
        another model or weights that do not fit.
        """

    def grid(self, steps: int, shift: float = 1.0) -> Grid:
        """The times at which a model of so many steps is asked.

        Raises:
            ValueError: the family's times know no shift but 1, or another number is out of range.
        """

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        """The network's prediction, float32, computed in the network's own dtype.

        `t` is that of the process, `[B]`; `named` goes to the network, such as `lora_scale` of a `LoRANetwork`.
        """

    def condition(self, prompts: Sequence[Any]) -> Condition:
        """Class labels or texts to the network's condition, without gradient. ValueError for one that cannot be."""

    def null_condition(self, batch: int) -> Condition:
        """The condition of the unconditional prediction."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, H, W]` to pictures `[B, 3, H', W']` in [0, 1], float32; gradients flow."""

    def encode(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] to the mean of their latents."""

    def save(self, network: nn.Module, folder: Path) -> None:
        """Write a network as `folder/network_part`, which `load_network` opens; of SiT also the VAE."""

    def save_state_dict(self, network: nn.Module, file: str | Path) -> None:
        """Write a network's weights as one `.safetensors` or `.bin` file, which `load_network` opens, too."""

    def save_lora(self, network: "LoRANetwork", folder: Path) -> None:
        """Write the adapter alone, for PEFT and for diffusers' own loader. Only of a family that keeps LoRA."""

    def save_scheduler(self, folder: Path, shift: float, stochastic: bool = False) -> None:
        """Write `folder/scheduler/scheduler_config.json`, which tells a stock pipeline how to sample a student.

        Does nothing for a family without a pipeline.

        Args:
            stochastic: renoise between steps, for a student that was trained with "sde".
        """

    def usage(self, folder: Path, sampling: Mapping[str, Any], lora: bool) -> str:
        """How to draw from the student in `folder`, as Markdown.

        Args:
            sampling: what its dmdr.json says.
            lora: whether it is a LoRA; unused by a family that keeps none.
        """

    def save_memory(
        self,
        vae_checkpointing: bool = False,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        offload_text: bool = False,
    ) -> None:
        """Switch on what saves memory; gradients flow with all of it.

        Args:
            vae_checkpointing: recompute the decoder's activations in the backward pass.
            vae_tiling: decode overlapping tiles of half the side, and blend them. The picture changes a little.
            vae_slicing: decode one picture after the other.
            offload_text: a text encoder is on the device only while it encodes.

        Raises:
            ValueError: there is no text encoder to offload.
        """

    def to(self, device: torch.device | str) -> "Family":
        """Move what the family holds besides the networks: the decoder, and text encoders that are not offloaded."""


def load(family: str, path: str | Path, **options: Any) -> Family:
    """Open a model folder (or hub name) of the given family; networks are loaded later, by `load_network`.

    Args:
        options: `vae`, folder or hub name of another VAE; `dtype` of everything that is loaded, float32 by default;
            of text families also `resolution` in pixels and `max_tokens`.

    Raises:
        ValueError: no such family, the folder holds another model, or an option cannot be for it.
        FileNotFoundError: a file of the model is missing.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}; valid are {', '.join(FAMILIES)}")
    module, name = FAMILIES[family]
    return getattr(importlib.import_module(module), name)(path, **options)
