"""What saves memory in the decoder of a VAE, an AutoencoderKL or an AutoencoderTiny of diffusers."""

from typing import Any


def checkpoint(vae: Any) -> None:
    """Recompute the decoder's activations in the backward pass."""
    vae.enable_gradient_checkpointing()
    vae.encoder.gradient_checkpointing = False  # AutoencoderTiny's would see pictures of another range


def tile(vae: Any, side: int, factor: int) -> None:
    """Decode overlapping tiles of half the picture's side, and blend them.

    Args:
        side: of the latent.
        factor: pixels per latent, along a side.
    """
    # diffusers' own tiles are as large as the picture. They overlap by a quarter, which must be whole latents.
    vae.tile_latent_min_size = max(4, side // 8 * 4)
    vae.tile_sample_min_size = vae.tile_latent_min_size * factor
    vae.tile_overlap_factor = 0.25
    vae.enable_tiling()
