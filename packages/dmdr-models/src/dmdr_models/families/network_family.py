"""The base class of every family: a network in diffusers' style whose latents are the pictures themselves."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from dmdr_core import FlowMatching, Grid, StepGrid, VariancePreserving
from torch import Tensor, nn

from dmdr_models.base.picture_size import Resolution, as_size
from dmdr_models.families.network_students import NetworkStudents
from dmdr_models.families.protocols import Condition, Students
from dmdr_models.folder import read_parts
from dmdr_models.folder.checks import check_size
from dmdr_models.folder.layout import Layout
from dmdr_models.networks.lora_files import LoRA, read_lora
from dmdr_models.networks.quantised import freeze_torchao


class NetworkFamily(ABC):
    """A flow-matching network in diffusers' style (ModelMixin and ConfigMixin) over pictures in [-1, 1].

    A family with another process or another grid overrides `process` and `grid`; one with a decoder starts from
    `dmdr_models.families.latent_family.LatentFamily`. The network's config holds `in_channels` and `sample_size`, the
    side of its input; that of a family with class labels also `num_classes`.

    Args:
        path: folder or hub name that holds the network.
        resolution: side of the picture in pixels, or (height, width) (default: what the network was trained for).
        dtype: of all that the family loads; pictures and latents are float32 whatever it is.

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks a part.
        ValueError: it holds another model, or the model cannot draw at the resolution.
    """

    layout: Layout
    network_class: Any
    fixed: tuple[str, ...] = ("in_channels", "sample_size")
    """Entries that the config of other weights for the network must have in common with the model's."""
    factor: int = 1
    """Pixels per latent, along a side."""
    process: FlowMatching | VariancePreserving = FlowMatching(t_end=0.0)
    shift: float = 1.0
    lora_targets: tuple[str, ...]
    lora_pipeline: Any = None
    """The class in diffusers whose converters read LoRAs in other layouts than PEFT's."""

    def __init__(self, path: str | Path, resolution: Resolution | None = None, dtype: torch.dtype = torch.float32):
        self.path = str(path)
        part = self.layout.network_part
        self.config = read_parts.part_config(self.network_class, self.path, part, quantised=True)
        self.num_classes: int | None = self.config.get("num_classes")
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.size = as_size(self.config["sample_size"] * self.factor if resolution is None else resolution)
        self.latent_shape(*self.size)

    @property
    def students(self) -> Students:
        return NetworkStudents(self)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        check_size(self.layout, self.config, self.factor, height, width)
        return self.config["in_channels"], height // self.factor, width // self.factor

    def load_network(self, weights: str | Path | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        same = {name: self.config[name] for name in self.fixed}
        part = self.layout.network_part
        network = read_parts.load_network(self.network_class, self.path, part, weights, dtype or self.dtype, same)
        freeze_torchao(network)
        return network

    def read_lora(self, path: str | Path) -> LoRA:
        return read_lora(path, self.layout, self.lora_pipeline, self.config)

    def grid(self, steps: int, shift: float = 1.0) -> Grid:
        assert isinstance(self.process, FlowMatching)
        return StepGrid(steps, shift, self.process.t_end)

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is given as the time, for times `[B]` of the process."""
        return t

    @abstractmethod
    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        """See `dmdr_models.families.protocols.Family.predict`."""

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] to the mean of their latents."""
        return images.float() * 2 - 1

    def open_decoder(self) -> None:  # noqa: B027
        """Nothing is to be read: the latents are the pictures."""

    def save_memory(
        self,
        vae_checkpointing: bool = False,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        offload_text: bool = False,
    ) -> None:
        """See `dmdr_models.families.protocols.Family.save_memory`."""
        vae = {"vae_checkpointing": vae_checkpointing, "vae_tiling": vae_tiling, "vae_slicing": vae_slicing}
        for name, on in vae.items():
            if on:
                raise ValueError(f"{name}: the family {self.layout.name} has no VAE; leave it out")
        if offload_text:
            self.offload_text()

    def offload_text(self) -> None:
        """Keep the text encoders on the CPU except while they encode.

        Raises:
            ValueError: there are none.
        """
        raise ValueError("offload_text: there are no text encoders to offload; leave it out")

    def use_empty_text(self) -> None:
        """See `dmdr_models.families.protocols.Family.use_empty_text`."""
        raise ValueError(f"empty_text: the family {self.layout.name} takes no texts; leave it out")

    def to(self, device: torch.device | str) -> Any:
        self.device = torch.device(device)
        return self


def in_own_dtype(network: Any, x_t: Tensor, condition: Condition) -> tuple[Tensor, Condition]:
    """The input of a network in the dtype of its weights; whole numbers stay as they are.

    The parameters that a LoRANetwork adds may be more exact than the network's; the network's decide.
    """
    dtype = next(getattr(network, "base", network).parameters()).dtype
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
    return x_t.to(dtype), cast
