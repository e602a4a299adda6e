"""The base class of text-to-image families: the text encoders, the network and the VAE of a stock pipeline."""

from abc import ABC
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from dmdr_core.base.devices import on_device

from dmdr_models.base.picture_size import Resolution
from dmdr_models.families.latent_family import LatentFamily
from dmdr_models.families.protocols import Condition
from dmdr_models.families.text_encoders import TextEncoders


class TextFamily(LatentFamily, ABC):
    """A family that takes texts; see `dmdr_models.families.protocols.Family`.

    Args:
        path: folder or hub name of the whole model. The text encoders may be missing if `text` is replaced.
        text: its text encoders.
        vae: folder or hub name of another VAE.
        resolution: side of the picture in pixels, or (height, width) (default: what the network was trained for).
        dtype: of networks, text encoders and VAE.

    Raises:
        FileNotFoundError: no such folder or hub name, or a part is missing.
        ValueError: a part is of another class, or the model cannot draw at the resolution.
    """

    def __init__(
        self,
        path: str | Path,
        text: TextEncoders,
        vae: str | Path | None = None,
        resolution: Resolution | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(path, vae, resolution, dtype)
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
        return {name: on_device(value, self.device) for name, value in self.text(prompts).items()}

    def use_empty_text(self) -> None:
        """Do nothing: the unconditional prediction is that of the empty text, unless a family says otherwise."""

    def null_condition(self, batch: int) -> Condition:
        if self._null is None or self._null[0] is not self.text:
            self._null = self.text, self.condition([""])
        return {name: value.expand(batch, *value.shape[1:]) for name, value in self._null[1].items()}
