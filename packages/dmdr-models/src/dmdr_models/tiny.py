"""Small random-weight models of every family, for tests, demos and trying a recipe: no download, no GPU.

path = dmdr_models.tiny.sit("somewhere")     # a folder that dmdr_models.load("sit", path) opens
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn


def randomise(network: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Fill every parameter with noise, so that no layer is silent (adaLN-zero starts with a zero output)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std, generator=generator)
    return network


def sit(
    path: str | Path,
    *,
    sample_size: int = 4,
    width: int = 32,
    depth: int = 2,
    num_heads: int = 2,
    num_classes: int = 10,
    qk_norm: bool = False,
    seed: int = 0,
) -> Path:
    """Write a SiT with its VAE to `path`, and return `path`.

    The pictures are `8 · sample_size` pixels wide, as with the full model's VAE.
    """
    from diffusers import AutoencoderKL

    from dmdr_models.sit.transformer import SiTTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer: Any = SiTTransformer(
            sample_size=sample_size,
            patch_size=2,
            width=width,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            qk_norm=qk_norm,
        )
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
    randomise(transformer, seed)
    transformer.save_pretrained(Path(path) / "transformer")
    vae.save_pretrained(Path(path) / "vae")
    return Path(path)
