"""SDXL's two text encoders: prompts to the condition of the UNet.

    encoder_hidden_states = [CLIP-L | CLIP-G]       [B, 77, D], the states before the last layer
    text_embeds           = CLIP-G, pooled          [B, P]

where | joins features. Every sequence is padded, or cut, to CLIP's length, and nothing is masked. Source: "SDXL:
Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv 2307.01952.
"""

from collections.abc import Sequence

import torch

from dmdr_models.families.protocols import Condition
from dmdr_models.families.text_encoders import TextEncoders
from dmdr_models.sdxl.layout import LAYOUT


class SDXLTextEncoders(TextEncoders):
    """See `dmdr_models.families.text_encoders.TextEncoders`."""

    layout = LAYOUT

    @property
    def lengths(self) -> list[int]:
        return [tokenizer.model_max_length for tokenizer in self.tokenizers]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        found = [self.clip(*one, prompts, length) for one, length in zip(self.parts, self.lengths, strict=True)]
        return {
            "encoder_hidden_states": torch.cat([states for _, states in found], dim=-1),
            "text_embeds": found[-1][0],
        }
