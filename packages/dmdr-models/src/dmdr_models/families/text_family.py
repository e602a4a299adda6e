"""What the text-to-image families share: text encoders, and conditions that are made of texts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmdr_models.families import stock_students as export
from dmdr_models.families.latent_family import LatentFamily
from dmdr_models.families.protocols import Condition
from dmdr_models.folder.contents import PARTS, check_part
from dmdr_models.networks.lora import LoRANetwork

TOKENIZERS = {
    "CLIPTextModel": "CLIPTokenizer",
    "CLIPTextModelWithProjection": "CLIPTokenizer",
    "T5EncoderModel": "T5TokenizerFast",
}


class TextEncoders(ABC):
    """The encoders of a model, and what makes a condition of their outputs: calling it with prompts gives that.

    They are opened at the first call. A family's own class adds `__call__`.

    Args:
        path: folder or hub name of the model.
        dtype: of the encoders and of the condition.

    Raises:
        FileNotFoundError: an encoder is missing, at the first call.
        ValueError: one is of another class.
    """

    family: str

    def __init__(self, path: str, dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        self.device = torch.device("cpu")
        self.offload = False

    @cached_property
    def parts(self) -> list[tuple[Any, Any]]:
        """Each encoder with its tokenizer."""
        import transformers

        found = []
        for part, kinds in PARTS[self.family].items():
            if part.startswith("text_encoder"):
                check_part(self.path, part, kinds)
                encoder = getattr(transformers, kinds[0]).from_pretrained(
                    self.path, subfolder=part, dtype=self.dtype, use_safetensors=True
                )
                folder = part.replace("text_encoder", "tokenizer")
                tokenizer = getattr(transformers, TOKENIZERS[kinds[0]]).from_pretrained(self.path, subfolder=folder)
                where = "cpu" if self.offload else self.device
                found.append((encoder.eval().requires_grad_(False).to(where), tokenizer))
        return found

    @abstractmethod
    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts to their condition, tensors `[B, …]`, without gradient."""

    def run(self, encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int, **options: Any) -> Any:
        """An encoder's output for prompts that are padded, or cut, to `length` tokens; nothing is masked."""
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        if self.offload:
            encoder.to(self.device)
        output = encoder(tokens.to(self.device), **options)
        if self.offload:
            encoder.to("cpu")
        return output

    def clip(self, encoder: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """A CLIP's first output, which is the pooled one if it projects, and its states before the last layer."""
        output = self.run(encoder, tokenizer, prompts, length, output_hidden_states=True)
        return output[0], output.hidden_states[-2]

    def to(self, device: torch.device | str) -> "TextEncoders":
        self.device = torch.device(device)
        if "parts" in self.__dict__ and not self.offload:
            for encoder, _ in self.parts:
                encoder.to(self.device)
        return self


class TextFamily(LatentFamily, ABC):
    """A family that draws what texts say; see `dmdr_models.families.protocols.Family`.

    Args:
        path: folder or hub name of the whole model. The text encoders may be missing where `text` is replaced.
        vae: folder or hub name of another VAE.
        text: of the model.
        dtype: of networks, text encoders and VAE.

    Raises:
        FileNotFoundError: no such folder or hub name, or a part is missing.
        ValueError: a part is of another class.
    """

    pipeline_class: Any
    card_dtype = "bfloat16"
    """In which a student's card tells to draw."""
    num_classes = None
    keeps_lora = True

    def __init__(self, path: str | Path, vae: str | Path | None, text: TextEncoders, dtype: torch.dtype):
        super().__init__(path, vae, dtype)
        self.text: Callable[[Sequence[str]], Condition] = text
        self._null: tuple[Any, Condition] | None = None

    def to(self, device: torch.device | str) -> Any:
        if isinstance(self.text, TextEncoders):
            self.text.to(device)
        self._null = None
        return super().to(device)

    def offload_text(self) -> None:
        if not isinstance(self.text, TextEncoders):
            raise ValueError("offload_text: the texts come from elsewhere, there is nothing to offload; leave it out")
        self.text.offload = True

    def condition(self, prompts: Sequence[Any]) -> Condition:
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of texts, got {prompts!r}")
        return {name: value.to(self.device) for name, value in self.text(prompts).items()}

    def null_condition(self, batch: int) -> Condition:
        if self._null is None or self._null[0] is not self.text:
            self._null = self.text, self.condition([""])
        return {name: value.expand(batch, *value.shape[1:]) for name, value in self._null[1].items()}

    def save_lora(self, network: LoRANetwork, folder: Path) -> None:
        local = Path(self.path).is_dir()
        base = Path(self.path).name if local else self.path
        export.save_lora(network, folder, base, self.pipeline_class, self.network_part)

    def usage(self, folder: Path, sampling: Mapping[str, Any], lora: bool) -> str:
        option = "--adapter" if lora else "--weights"
        classes = self.pipeline_class, self.network_class, self.network_part
        opening = export.opening(*classes, self.path, str(folder), lora, self.card_dtype)
        return f"""    dmdr-generate --model {self.path} {option} {folder} "a photo of a fox in the snow" -o fox.png

Or with diffusers alone, at the times of the training (a plain call with as many steps visits others):

```python
{self.snippet(*opening, sampling)}```
"""

    @abstractmethod
    def snippet(self, names: str, opening: str, sampling: Mapping[str, Any]) -> str:
        """The code that draws a picture from a student; see a family's `export.snippet`."""


def in_own_dtype(network: Any, x_t: Tensor, condition: Condition) -> tuple[Tensor, Condition]:
    """What a network is asked, in the dtype of its weights; whole numbers stay what they are.

    A LoRANetwork's own parameters may be more exact than those of the network that it adapts, which decide.
    """
    dtype = next(getattr(network, "base", network).parameters()).dtype
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
    return x_t.to(dtype), cast
