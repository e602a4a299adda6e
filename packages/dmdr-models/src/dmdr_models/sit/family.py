"""SiT as a family: labels in, latents of an SD-style VAE out.

A model is a folder in diffusers' layout: `transformer/` (a SiTTransformer) and `vae/`.
"""

from typing import Any

from torch import Tensor

from dmdr_models.families.class_labels import ClassLabels
from dmdr_models.families.latent_family import LatentFamily
from dmdr_models.families.protocols import Condition
from dmdr_models.sit.layout import LAYOUT
from dmdr_models.sit.transformer import SiTTransformer


class SiT(ClassLabels, LatentFamily):
    """The SiT family; see `dmdr_models.families.latent_family.LatentFamily` for its arguments.

    A SiT draws pictures of one size. Another `resolution` is a ValueError.
    """

    layout = LAYOUT
    network_class = SiTTransformer
    fixed = ("in_channels", "sample_size", "num_classes")
    lora_targets = ("to_q", "to_v")

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        return network(x_t, t, **condition, **named).float()
