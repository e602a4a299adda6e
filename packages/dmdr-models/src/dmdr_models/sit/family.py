"""SiT as a family: labels in, latents of an SD-style VAE out.

A model is a folder in diffusers' layout: `transformer/` (a SiTTransformer) and `vae/`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from dmdr_core import FlowMatching, StepGrid
from torch import Tensor, nn

from dmdr_models.families.latent_family import LatentFamily
from dmdr_models.families.protocols import Condition
from dmdr_models.sit.transformer import SiTTransformer


class SiT(LatentFamily):
    """The SiT family; see `dmdr_models.families.protocols.Family`.

    Args:
        path: folder (or hub name) with `transformer/`, and with `vae/` unless `vae` is given.
        vae: folder or hub name of another VAE, such as "stabilityai/sd-vae-ft-ema".
        resolution, max_tokens: of other families; the model's own picture size may be given.
        dtype: of networks and VAE.

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks transformer/config.json or vae/config.json.
        ValueError: the folder holds a model of another class, or an option is not for SiT.
    """

    name = "sit"
    network_class = SiTTransformer
    fixed = ("in_channels", "sample_size", "num_classes")
    lora_targets = ("to_q", "to_v")
    shift = 1.0
    keeps_lora = False
    max_tokens = None

    def __init__(
        self,
        path: str | Path,
        vae: str | Path | None = None,
        resolution: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(path, vae, dtype)
        self.process = FlowMatching(t_end=0.0)
        self.num_classes: int = self.config["num_classes"]
        self.latent_shape = (self.config["in_channels"], self.config["sample_size"], self.config["sample_size"])
        if resolution not in (None, self.image_size):
            raise ValueError(f"resolution {resolution}: this SiT draws {self.image_size} pixels only; leave it out")
        if max_tokens is not None:
            raise ValueError(f"max_tokens {max_tokens}: a SiT takes class labels, not texts; leave it out")

    def grid(self, steps: int, shift: float = 1.0) -> StepGrid:
        return StepGrid(steps, shift, self.process.t_end)

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        return network(x_t, t, **condition, **named).float()

    def condition(self, prompts: Sequence[Any]) -> Condition:
        try:
            labels = torch.as_tensor(prompts)
        except (TypeError, ValueError, RuntimeError):
            labels = torch.empty(0)
        if labels.dtype.is_floating_point or labels.dtype == torch.bool or labels.ndim != 1:
            raise ValueError(f"class labels must be a list of whole numbers, got {prompts!r}")
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise ValueError(f"class label {int(wrong[0])} is out of range; valid are 0 to {self.num_classes - 1}")
        return {"class_labels": labels.long().to(self.device)}

    def null_condition(self, batch: int) -> Condition:
        return {"class_labels": torch.full((batch,), self.num_classes, device=self.device)}

    def save(self, network: nn.Module, folder: Path) -> None:
        super().save(network, folder)
        self.vae.save_pretrained(folder / "vae")

    def save_scheduler(self, folder: Path, shift: float, stochastic: bool = False) -> None:
        """No pipeline of diffusers runs a SiT."""

    def usage(self, folder: Path, sampling: Mapping[str, Any], lora: bool = False) -> str:
        return f"    dmdr-generate --family sit --model {folder} --classes 0,1 -o pictures.png\n"
