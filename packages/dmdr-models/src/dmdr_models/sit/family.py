"""SiT as a family: labels in, latents of an SD-style VAE out.

A model is a folder in diffusers' layout: `transformer/` (a SiTTransformer) and `vae/` (an AutoencoderKL).
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from dmdr_core import FlowMatching
from torch import Tensor, nn

from dmdr_models.describe import check_part
from dmdr_models.family import Condition
from dmdr_models.sit.transformer import SiTTransformer


class SiT:
    """The SiT family; see `dmdr_models.family.Family`.

    Args:
        path: folder (or hub name) with `transformer/`, and with `vae/` unless `vae` is given.
        vae: folder or hub name of another AutoencoderKL, such as "stabilityai/sd-vae-ft-ema".

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks transformer/config.json or vae/config.json.
        ValueError: the folder holds a model of another class.
    """

    name = "sit"
    lora_targets = ("to_q", "to_v")

    def __init__(self, path: str | Path, vae: str | Path | None = None):
        self.path = str(path)
        self.vae_path = None if vae is None else str(vae)
        self.device = torch.device("cpu")
        check_part(self.path, "transformer", "SiTTransformer")
        if self.vae_path is None:
            check_part(self.path, "vae", "AutoencoderKL")
        else:
            check_part(self.vae_path, "", "AutoencoderKL")
        try:
            self.config = SiTTransformer.load_config(self.path, subfolder="transformer")
        except OSError as error:
            raise FileNotFoundError(
                f"{self.path} is no folder here, nor a model on the hub that can be read"
            ) from error
        self.process = FlowMatching(t_end=0.0)
        self.num_classes: int = self.config["num_classes"]
        self.latent_shape = (self.config["in_channels"], self.config["sample_size"], self.config["sample_size"])

    @cached_property
    def vae(self) -> Any:
        folder = {"subfolder": "vae"} if self.vae_path is None else {}
        vae: Any = AutoencoderKL.from_pretrained(self.vae_path or self.path, torch_dtype=torch.float32, **folder)
        return vae.eval().requires_grad_(False).to(self.device)

    @property
    def image_size(self) -> int:
        return self.config["sample_size"] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to(self, device: torch.device | str) -> "SiT":
        self.device = torch.device(device)
        if "vae" in self.__dict__:
            self.vae.to(self.device)
        return self

    def load_network(self, weights: str | Path | None = None) -> nn.Module:
        path, part = self.path, "transformer"
        if weights is not None:
            path = str(weights)
            part = "transformer" if (Path(weights) / "transformer").is_dir() else ""
            if not Path(weights).is_dir():
                raise FileNotFoundError(f"no folder {weights}")
        check_part(path, part, "SiTTransformer")
        network, faults = SiTTransformer.from_pretrained(
            path, subfolder=part or None, torch_dtype=torch.float32, output_loading_info=True
        )
        found = "; ".join(f"{fault}: {', '.join(map(str, names))}" for fault, names in faults.items() if names)
        if found:
            raise ValueError(f"the weights in {path} do not fit their config: {found}")
        for name in ("in_channels", "sample_size", "num_classes"):
            if network.config[name] != self.config[name]:
                raise ValueError(f"{path} has {name} {network.config[name]}, the model {self.config[name]}")
        return network.eval()

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

    def decode(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0.0)
        return (self.vae.decode(unscaled).sample / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        config = self.vae.config
        mean = self.vae.encode(images * 2 - 1).latent_dist.mean
        return (mean - (config.shift_factor or 0.0)) * config.scaling_factor

    def save(self, network: nn.Module, folder: Path) -> None:
        network.save_pretrained(folder / "transformer")  # type: ignore[operator]
        self.vae.save_pretrained(folder / "vae")
