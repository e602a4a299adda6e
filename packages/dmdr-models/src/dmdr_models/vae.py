"""Between latents and pictures: the part that every family with an AutoencoderKL shares."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dmdr_models.parts import part_config


class LatentFamily:
    """A family whose latents an AutoencoderKL codes; it is opened when it is first used, frozen, in `dtype`.

    Args:
        path: folder or hub name that holds `vae/`, unless `vae` is given.
        vae: folder or hub name of another AutoencoderKL.
        dtype: of all that the family loads; pictures and latents come out in float32 whatever it is.

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks the VAE.
        ValueError: it holds another model.
    """

    latent_shape: tuple[int, int, int]

    def __init__(self, path: str | Path, vae: str | Path | None, dtype: torch.dtype):
        self.path = str(path)
        self.vae_path = None if vae is None else str(vae)
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.vae_config = part_config(AutoencoderKL, self.vae_path or self.path, "vae" if vae is None else "")
        self.vae_factor: int = 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def image_size(self) -> int:
        return self.latent_shape[-1] * self.vae_factor

    @cached_property
    def vae(self) -> Any:
        folder = {"subfolder": "vae"} if self.vae_path is None else {}
        vae: Any = AutoencoderKL.from_pretrained(
            self.vae_path or self.path, torch_dtype=self.dtype, use_safetensors=True, **folder
        )
        return vae.eval().requires_grad_(False).to(self.device)

    def to(self, device: torch.device | str) -> Any:
        self.device = torch.device(device)
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
        """See `dmdr_models.family.Family.save_memory`."""
        if offload_text:
            raise ValueError("offload_text: there are no text encoders to offload; leave it out")
        if vae_checkpointing:
            self.vae.enable_gradient_checkpointing()
        if vae_slicing:
            self.vae.enable_slicing()
        if vae_tiling:
            # Tiles of half the picture's side: diffusers' own are as large as the picture. They overlap by a quarter,
            # which must be whole latents.
            self.vae.tile_latent_min_size = max(4, self.latent_shape[-1] // 8 * 4)
            self.vae.tile_sample_min_size = self.vae.tile_latent_min_size * self.vae_factor
            self.vae.enable_tiling()

    def decode(self, latents: Tensor) -> Tensor:
        unscaled = latents.float() / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(unscaled.to(self.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        mean = self.vae.encode((images.float() * 2 - 1).to(self.vae.dtype)).latent_dist.mean.float()
        return (mean - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor
