"""SD3's three text encoders: prompts to the condition of the transformer.

    encoder_hidden_states = [CLIP-L | CLIP-G | 0] above [T5]       [B, 77 + max_tokens, D]
    pooled_projections    = [CLIP-L | CLIP-G], pooled              [B, P]

where | joins features, the CLIP states are those before the last layer, and D is T5's width. In a model without T5 its
states are zeros. Every sequence is padded, or cut, to its full length, and nothing is masked. Source: "Scaling
Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv 2403.03206.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dmdr_models.families.protocols import Condition
from dmdr_models.families.text_encoders import TextEncoders
from dmdr_models.sd3.layout import LAYOUT


class SD3TextEncoders(TextEncoders):
    """See `dmdr_models.families.text_encoders.TextEncoders`.

    Args:
        max_tokens: length of the T5 sequence.
        width: of T5's states, the transformer's `joint_attention_dim`.
    """

    layout = LAYOUT

    def __init__(self, path: str, max_tokens: int, width: int, dtype: torch.dtype):
        super().__init__(path, dtype)
        self.max_tokens, self.width = max_tokens, width

    @property
    def lengths(self) -> list[int]:
        clip = self.tokenizers[0].model_max_length  # both are cut to the first one's
        return [clip, clip, self.max_tokens][: len(self.tokenizers)]  # T5 may be missing

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Condition:
        clips, t5 = self.parts[:2], self.parts[2:]
        length = self.lengths[0]
        pooled, states = zip(*(self.clip(*clip, prompts, length) for clip in clips), strict=True)
        short = torch.cat(states, dim=-1)
        if t5:
            long = self.run(*t5[0], prompts, self.max_tokens)[0]
        else:
            long = short.new_zeros(len(short), self.max_tokens, self.width)
        short = F.pad(short, (0, long.shape[-1] - short.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([short, long], dim=1),
            "pooled_projections": torch.cat(pooled, dim=-1),
        }
