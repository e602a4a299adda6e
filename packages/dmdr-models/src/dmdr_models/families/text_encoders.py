"""The text encoders of a model: prompts to a network's condition."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from dmdr_core.base.devices import on_device
from torch import Tensor

from dmdr_models.families.protocols import Condition
from dmdr_models.families.visit_device import visit
from dmdr_models.folder.checks import check_tokenizer
from dmdr_models.folder.layout import Layout
from dmdr_models.folder.read_parts import load_text_encoder

TOKENIZERS = {
    "CLIPTextModel": "CLIPTokenizer",
    "CLIPTextModelWithProjection": "CLIPTokenizer",
    "T5EncoderModel": "T5TokenizerFast",
}


@dataclass(frozen=True)
class Cut:
    """Prompts of which the end is cut off: `count` are longer than `length` tokens, and the longest has `longest`."""

    parts: list[str]
    length: int
    count: int
    longest: int


class TextEncoders(ABC):
    """The text encoders of a model; an instance is called with prompts and returns their condition.

    The encoders are opened at the first call, which raises FileNotFoundError if one is missing and ValueError if one is
    of another class. A family's own class adds `lengths` and `__call__`.

    Args:
        path: folder or hub name of the model.
        dtype: of the encoders and of the condition.
    """

    layout: Layout

    def __init__(self, path: str, dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        self.device = torch.device("cpu")
        self.offload = False

    @cached_property
    def present(self) -> dict[str, tuple[str, ...]]:
        """The text encoders that the model has, with their classes."""
        lacking = self.layout.lacking(self.path)
        return {part: kinds for part, kinds in self.layout.text_encoders.items() if part not in lacking}

    @cached_property
    def tokenizers(self) -> list[Any]:
        """The tokenizer of each encoder; the encoders are not read."""
        import transformers

        found = []
        for part, kinds in self.present.items():
            if Path(self.path).is_dir():
                check_tokenizer(self.path, part)
            folder = part.replace("text_encoder", "tokenizer")
            found.append(getattr(transformers, TOKENIZERS[kinds[0]]).from_pretrained(self.path, subfolder=folder))
        return found

    @cached_property
    def parts(self) -> list[tuple[Any, Any]]:
        """Each encoder with its tokenizer, without those that the model lacks."""
        found = []
        for (part, kinds), tokenizer in zip(self.present.items(), self.tokenizers, strict=True):
            encoder = load_text_encoder(self.path, part, kinds, self.dtype)
            where = "cpu" if self.offload else self.device
            found.append((encoder.requires_grad_(False).to(where), tokenizer))
        return found

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """The number of tokens to which each encoder's sequence is padded or cut, start and end included."""

    def cut(self, prompts: Sequence[str]) -> list[Cut]:
        """Count the prompts that are longer than an encoder's sequence; encoders that cut the same are counted once."""
        found: dict[tuple[int, ...], list[str]] = {}
        for part, tokenizer, length in zip(self.present, self.tokenizers, self.lengths, strict=True):
            counts = [len(tokens) for tokens in tokenizer(list(prompts), verbose=False).input_ids] if prompts else []
            longer = [count for count in counts if count > length]
            if longer:
                found.setdefault((length, len(longer), max(longer)), []).append(part)
        return [Cut(parts, *numbers) for numbers, parts in found.items()]

    @abstractmethod
    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts to their condition, tensors `[B, …]`, without gradient."""

    def run(self, encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int, **options: Any) -> Any:
        """An encoder's output for prompts, each padded or cut to `length` tokens; nothing is masked."""
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        tokens = on_device(tokens, self.device)
        return visit(encoder, self.device, tokens, **options) if self.offload else encoder(tokens, **options)

    def clip(self, encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """A CLIP's first output, which is pooled if the CLIP has a projection, and its states before the last layer."""
        output = self.run(encoder, tokenizer, prompts, length, output_hidden_states=True)
        return output[0], output.hidden_states[-2]

    def to(self, device: torch.device | str) -> "TextEncoders":
        self.device = torch.device(device)
        if "parts" in self.__dict__ and not self.offload:
            for encoder, _ in self.parts:
                encoder.to(self.device)
        return self
