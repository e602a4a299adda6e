"""The base class of families with a VAE between their latents and pictures."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dmdr_models.base.picture_size import Resolution
from dmdr_models.families import vae_memory
from dmdr_models.families.network_family import NetworkFamily
from dmdr_models.families.network_students import NetworkStudents
from dmdr_models.families.protocols import Students
from dmdr_models.folder import read_parts
from dmdr_models.folder.contents import pixels_per_latent
from dmdr_models.folder.layout import VAES


class LatentFamily(NetworkFamily):
    """A family whose latents an AutoencoderKL or an AutoencoderTiny codes; the VAE is opened at its first use, frozen.

    Args:
        path: folder or hub name that holds the network, and `vae/` unless `vae` is given.
        vae: folder or hub name of another VAE.
        resolution: side of the picture in pixels, or (height, width) (default: what the network was trained for).
        dtype: of all that the family loads; pictures and latents are float32 whatever it is. A VAE that overflows in
            float16 is loaded in float32 instead.

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks the network or the VAE.
        ValueError: it holds another model, the latents are not those of the VAE, or the model cannot draw at the
            resolution.
    """

    def __init__(
        self,
        path: str | Path,
        vae: str | Path | None = None,
        resolution: Resolution | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.vae_place = (str(path), "vae") if vae is None else (str(vae), "")
        super().__init__(path, resolution, dtype)
        channels, own = self.vae_config["latent_channels"], self.config["in_channels"]
        if channels != own:
            raise ValueError(f"{self.vae_place[0]} holds a VAE with {channels} channels, the network takes {own}")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        config = read_parts.part_config(AutoencoderKL, *self.vae_place, VAES)
        self.layout.check_config("vae", config)
        return config

    @cached_property
    def factor(self) -> int:  # type: ignore[override]
        """Pixels per latent, along a side."""
        return pixels_per_latent(self.vae_config)

    @cached_property
    def vae(self) -> Any:
        overflows = self.dtype == torch.float16 and self.vae_config.get("force_upcast", True)
        vae = read_parts.load_vae(*self.vae_place, torch.float32 if overflows else self.dtype)
        return vae.requires_grad_(False).to(self.device)

    @property
    def students(self) -> Students:
        return LatentStudents(self)

    def open_decoder(self) -> None:
        self.vae  # noqa: B018

    def to(self, device: torch.device | str) -> Any:
        super().to(device)
        if "vae" in self.__dict__:
            self.vae.to(self.device)
        return self

    def save_memory(
        self,
        vae_checkpointing: bool = False,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        offload_text: bool = False,
    ) -> None:
        """See `dmdr_models.families.protocols.Family.save_memory`."""
        super().save_memory(offload_text=offload_text)
        if vae_checkpointing:
            vae_memory.checkpoint(self.vae)
        if vae_slicing:
            self.vae.enable_slicing()
        if vae_tiling:
            vae_memory.tile(self.vae, max(self.size) // self.factor, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        scale, shift = self._statistics(latents)
        unscaled = latents.float() / scale + shift
        return (self.vae.decode(unscaled.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1] to the mean of their latents."""
        coded = self.vae.encode((images.float() * 2 - 1).to(self.vae.dtype))
        mean = coded.latents if "latents" in coded else coded.latent_dist.mean  # AutoencoderTiny's have no spread
        scale, shift = self._statistics(mean)
        return (mean.float() - shift) * scale

    def _statistics(self, like: Tensor) -> tuple[Any, Any]:
        """The scale and the shift of the VAE's latents: latents = (coded − shift) · scale; numbers, or per channel."""
        config = self.vae.config
        scale, shift = config.scaling_factor, config.shift_factor or 0.0
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return scale, shift
        mean, std = (like.new_tensor(config[name], dtype=torch.float32) for name in ("latents_mean", "latents_std"))
        return scale / std.view(-1, 1, 1), mean.view(-1, 1, 1) + shift


class LatentStudents(NetworkStudents):
    """The network and its VAE, in one folder."""

    family: LatentFamily

    def save(self, network: nn.Module, folder: Path) -> None:
        super().save(network, folder)
        self.family.vae.save_pretrained(folder / "vae")
