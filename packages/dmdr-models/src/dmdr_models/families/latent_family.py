"""What every family shares: a network in diffusers' style, and a VAE between its latents and pictures."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dmdr_models.folder import read_parts as parts
from dmdr_models.folder.contents import VAES, network_part, pixels_per_latent


class LatentFamily:
    """A family whose latents an AutoencoderKL or an AutoencoderTiny codes; it is opened when it is first used, frozen.

    Args:
        path: folder or hub name that holds the network, and `vae/` unless `vae` is given.
        vae: folder or hub name of another VAE.
        dtype: of all that the family loads; pictures and latents come out in float32 whatever it is. A VAE that
            overflows in float16 is loaded in float32 instead.

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks the network or the VAE.
        ValueError: it holds another model, or the latents are not those of the VAE.
    """

    name: str
    network_class: Any
    fixed: tuple[str, ...]
    """What the config of other weights for the network must have in common with the model's."""
    latent_shape: tuple[int, int, int]

    def __init__(self, path: str | Path, vae: str | Path | None, dtype: torch.dtype):
        self.path = str(path)
        self.network_part = network_part(self.name)
        self.config = parts.part_config(self.network_class, self.path, self.network_part)
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.vae_place = (self.path, "vae") if vae is None else (str(vae), "")
        self.vae_config = parts.part_config(AutoencoderKL, *self.vae_place, VAES)
        self.vae_factor = pixels_per_latent(self.vae_config)
        channels, own = self.vae_config["latent_channels"], self.config["in_channels"]
        if channels != own:
            raise ValueError(f"{self.vae_place[0]} holds a VAE with {channels} channels, the network takes {own}")

    @property
    def image_size(self) -> int:
        return self.latent_shape[-1] * self.vae_factor

    @cached_property
    def vae(self) -> Any:
        overflows = self.dtype == torch.float16 and self.vae_config.get("force_upcast", True)
        vae = parts.load_vae(*self.vae_place, torch.float32 if overflows else self.dtype)
        return vae.requires_grad_(False).to(self.device)

    def to(self, device: torch.device | str) -> Any:
        self.device = torch.device(device)
        if "vae" in self.__dict__:
            self.vae.to(self.device)
        return self

    def load_network(self, weights: str | Path | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """See `dmdr_models.families.protocols.Family.load_network`."""
        same = {name: self.config[name] for name in self.fixed}
        return parts.load_network(self.network_class, self.path, self.network_part, weights, dtype or self.dtype, same)

    def save(self, network: nn.Module, folder: Path) -> None:
        """See `dmdr_models.families.protocols.Family.save`."""
        network.save_pretrained(folder / self.network_part)  # type: ignore[operator]

    def save_state_dict(self, network: nn.Module, file: str | Path) -> None:
        """See `dmdr_models.folder.read_parts.save_state_dict`."""
        parts.save_state_dict(network, file)

    def save_memory(
        self,
        vae_checkpointing: bool = False,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        offload_text: bool = False,
    ) -> None:
        """See `dmdr_models.families.protocols.Family.save_memory`."""
        if offload_text:
            self.offload_text()
        if vae_checkpointing:
            self.vae.enable_gradient_checkpointing()
            self.vae.encoder.gradient_checkpointing = False  # AutoencoderTiny's would see pictures of another range
        if vae_slicing:
            self.vae.enable_slicing()
        if vae_tiling:
            # Tiles of half the picture's side: diffusers' own are as large as the picture. They overlap by a quarter,
            # which must be whole latents.
            self.vae.tile_latent_min_size = max(4, self.latent_shape[-1] // 8 * 4)
            self.vae.tile_sample_min_size = self.vae.tile_latent_min_size * self.vae_factor
            self.vae.tile_overlap_factor = 0.25
            self.vae.enable_tiling()

    def offload_text(self) -> None:
        """Keep the text encoders on the CPU but while they encode.

        Raises:
            ValueError: there are none.
        """
        raise ValueError("offload_text: there are no text encoders to offload; leave it out")

    def decode(self, latents: Tensor) -> Tensor:
        unscaled = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(unscaled.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        coded = self.vae.encode((images.float() * 2 - 1).to(self.vae.dtype))
        mean = coded.latents if "latents" in coded else coded.latent_dist.mean  # AutoencoderTiny's have no spread
        return (mean.float() - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
