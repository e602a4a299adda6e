"""SD3's three text encoders: prompts to the condition of the transformer.

    encoder_hidden_states = [CLIP-L | CLIP-G | 0] above [T5]       [B, 77 + max_tokens, D]
    pooled_projections    = [CLIP-L | CLIP-G], pooled              [B, P]

where | joins features, the CLIP states are those before the last layer, and D is T5's width. Every sequence is padded,
or cut, to its full length, and nothing is masked. Source: "Scaling Rectified Flow Transformers for High-Resolution
Image Synthesis", arXiv 2403.03206.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmdr_models.describe import PARTS, check_part

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class TextEncoders:
    """Calling it with prompts gives their condition; the encoders are opened at the first call.

    Args:
        path: folder or hub name of the model.
        max_tokens: length of the T5 sequence.
        dtype: of the encoders and of the condition.

    Raises:
        FileNotFoundError: an encoder is missing.
        ValueError: one is of another class.
    """

    def __init__(self, path: str, max_tokens: int, dtype: torch.dtype):
        self.path, self.max_tokens, self.dtype = path, max_tokens, dtype
        self.device = torch.device("cpu")
        self.offload = False

    @cached_property
    def parts(self) -> list[tuple[Any, Any]]:
        """Each encoder with its tokenizer."""
        import transformers

        found = []
        for part in ENCODERS:
            kind = PARTS["sd3"][part]
            check_part(self.path, part, kind)
            encoder = getattr(transformers, kind).from_pretrained(
                self.path, subfolder=part, dtype=self.dtype, use_safetensors=True
            )
            folder = part.replace("text_encoder", "tokenizer")
            tokenizers = {"CLIPTextModelWithProjection": "CLIPTokenizer", "T5EncoderModel": "T5TokenizerFast"}
            tokenizer = getattr(transformers, tokenizers[kind]).from_pretrained(self.path, subfolder=folder)
            where = "cpu" if self.offload else self.device
            found.append((encoder.eval().requires_grad_(False).to(where), tokenizer))
        return found

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        *clips, t5 = self.parts
        pooled, states = zip(*(self._clip(encoder, tokenizer, prompts) for encoder, tokenizer in clips), strict=True)
        long = self._run(*t5, prompts, self.max_tokens)[0]
        short = torch.cat(states, dim=-1)
        short = F.pad(short, (0, long.shape[-1] - short.shape[-1]))
        return {
            "encoder_hidden_states": torch.cat([short, long], dim=1),
            "pooled_projections": torch.cat(pooled, dim=-1),
        }

    def _clip(self, encoder: Any, tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        # Both are cut to the first one's length.
        output = self._run(encoder, tokenizer, prompts, self.parts[0][1].model_max_length, output_hidden_states=True)
        return output[0], output.hidden_states[-2]

    def _run(self, encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int, **options: Any) -> Any:
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        if self.offload:
            encoder.to(self.device)
        output = encoder(tokens.to(self.device), **options)
        if self.offload:
            encoder.to("cpu")
        return output

    def to(self, device: torch.device | str) -> "TextEncoders":
        self.device = torch.device(device)
        if "parts" in self.__dict__ and not self.offload:
            for encoder, _ in self.parts:
                encoder.to(self.device)
        return self
