"""What a model family is: the interface between the training, the sampler and a network.

    family = dmdr_models.load("sit", "path/to/model")
    network = family.load_network()
    condition = family.condition([207, 360])
    prediction = family.predict(network, x_t, t, condition)
    images = family.decode(family.process.to_x0(x_t, prediction, t))

A family knows how its networks are called, what its process is and how latents become pictures. It holds no roles:
generator, teacher and fake score are networks that `load_network` made. Opening a family reads only configs; networks,
decoder and text encoders are read when they are first used.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from dmdr_core import FlowMatching, Grid, VariancePreserving
from torch import Tensor, nn

if TYPE_CHECKING:
    from dmdr_models.networks.lora import LoRANetwork
    from dmdr_models.networks.lora_files import LoRA

Condition = dict[str, Tensor]
"""What a network is conditioned on, by the name of the network's argument; every tensor starts with the batch."""


class Family(Protocol):
    """The latent model of one family, opened from a folder.

    Attributes:
        process: the noise process that the network was trained with.
        size: (height, width) in pixels of the pictures that are drawn where no other size is asked for. The size of a
            picture is that of its latents; see `latent_shape`.
        num_classes: number of class labels, or None for a family that takes texts.
        shift: of the model's own step grid.
        lora_targets: the layers that the guidance network adapts unless a recipe says otherwise.
        text: of a family that takes texts, prompts to the condition without `null_condition`'s additions. It may be
            replaced, for example by a cache of embeddings; its tensors may be on any device.
        students: how a trained network is saved.
    """

    process: FlowMatching | VariancePreserving
    size: tuple[int, int]
    num_classes: int | None
    shift: float
    lora_targets: tuple[str, ...]
    text: Callable[[Sequence[str]], Condition]

    @property
    def students(self) -> "Students": ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture with this height and width in pixels.

        Raises:
            SizeError: the model cannot draw such a picture.
        """

    def load_network(self, weights: str | Path | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """Read a new copy of the base network, or the network in the folder or file `weights`, in eval mode.

        Args:
            weights: a folder that `save_pretrained` wrote, the folder above it, or the file of a state dict
                (`.safetensors`, or `.bin`, `.pt` and `.pth`, which are read without running any code).
            dtype: of the network (default: the family's).

        Raises:
            FileNotFoundError: a folder or file is missing.
            ValueError: it holds another model, or weights that do not fit.
        """

    def read_lora(self, path: str | Path) -> "LoRA":
        """Read a LoRA of the network from a folder or a file, in any layout that the family knows.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: it is no LoRA, or one with a tensor that has no place in the network.
        """

    def grid(self, steps: int, shift: float = 1.0) -> Grid:
        """The times at which a model of so many steps is asked.

        Raises:
            ValueError: a number is out of range, or the family knows no shift but 1.
        """

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        """The network's prediction `[B, C, h, w]`, float32, computed in the network's own dtype.

        Args:
            t: times of the process, `[B]`.
            named: further arguments of the network, such as `lora_scale` of a `LoRANetwork`.
        """

    def condition(self, prompts: Sequence[Any]) -> Condition:
        """The condition that stands for class labels or texts, without gradient.

        Raises:
            ValueError: a label or a text that the family does not take.
        """

    def null_condition(self, batch: int) -> Condition:
        """The condition of the unconditional prediction."""

    def use_empty_text(self) -> None:
        """Make `null_condition` the condition of the empty text, where a model's config says otherwise.

        Raises:
            ValueError: the family takes no texts.
        """

    def encode(self, images: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in [0, 1] to the mean of their latents `[B, c, h, w]`, float32."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` to pictures `[B, 3, H, W]` in [0, 1], float32; gradients flow."""

    def open_decoder(self) -> None:
        """Read now what `decode` would read at its first call; does nothing for a family without a decoder.

        Raises:
            FileNotFoundError, ValueError: it is missing or damaged.
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
            offload_text: keep the text encoders on the CPU except while they encode.

        Raises:
            ValueError: the family has no VAE, or no text encoders.
        """

    def to(self, device: torch.device | str) -> "Family":
        """Move what the family holds besides the networks: the decoder, and text encoders that are not offloaded."""


class Students(Protocol):
    """How a student, a trained network of a family, is written as files for others to use.

    Attributes:
        keeps_lora: whether stock diffusers can load a student's LoRA. If not, the LoRA is merged into the network.
        has_original: whether the model's authors published it in another layout, which other programs read.
        sampling: the family's own entries of a student's dmdr.json, by the name of `dmdr-generate`'s option.
    """

    keeps_lora: bool
    has_original: bool

    @property
    def sampling(self) -> dict[str, Any]: ...

    def save(self, network: nn.Module, folder: Path) -> None:
        """Write a whole network into `folder`, such that `load_network` opens the folder."""

    def save_lora(self, network: "LoRANetwork", folder: Path) -> None:
        """Write only the adapter, for PEFT, diffusers and other programs.

        Raises:
            ValueError: `keeps_lora` is False.
        """

    def save_original(self, network: nn.Module, file: Path) -> None:
        """Write a whole network as one .safetensors file in its authors' layout, for programs that read no other.

        Raises:
            ValueError: `has_original` is False.
        """

    def save_scheduler(self, folder: Path, shift: float, stochastic: bool = False) -> None:
        """Write `folder/scheduler/scheduler_config.json`, which tells a stock pipeline how to sample a student.

        Does nothing for a family without a pipeline.

        Args:
            stochastic: renoise between steps, for a student that was trained with "sde".
        """

    def usage(
        self, folder: Path, sampling: Mapping[str, Any], lora: bool, device: str = "cpu", dtype: str = "float32"
    ) -> str:
        """How to draw from the student in `folder`, as Markdown; its first line is a command.

        Args:
            sampling: the student's dmdr.json.
            lora: whether the folder holds a LoRA; always False if the family keeps none.
            device, dtype: that the command and the code draw with, as torch calls them.
        """
