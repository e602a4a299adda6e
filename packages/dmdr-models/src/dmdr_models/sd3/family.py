"""Stable Diffusion 3 and 3.5 as a family: texts in, latents of a 16-channel VAE out.

A model is a folder in diffusers' layout (or its name on the hub), as StableDiffusion3Pipeline saves it. SD3-Medium,
SD3.5-Medium and SD3.5-Large differ in their transformer's config alone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from dmdr_core import FlowMatching
from torch import Tensor, nn

from dmdr_models.describe import check_resolution
from dmdr_models.family import Condition
from dmdr_models.lora import LoRANetwork
from dmdr_models.parts import load_transformer, part_config
from dmdr_models.sd3 import T_END, export
from dmdr_models.sd3.text import TextEncoders
from dmdr_models.vae import LatentFamily


class SD3(LatentFamily):
    """The SD3 family; see `dmdr_models.family.Family`.

    Args:
        path: folder or hub name of the whole model. The text encoders may be missing where `text` is replaced.
        vae: folder or hub name of another AutoencoderKL.
        resolution: side of the picture in pixels (default: what the transformer was trained for).
        max_tokens: length of the T5 sequence, at most 512 (default: 128).
        dtype: of networks, text encoders and VAE.

    Raises:
        FileNotFoundError: no such folder or hub name, or a part is missing.
        ValueError: a part is of another class, or the resolution or the length cannot be.
    """

    name = "sd3"
    num_classes = None
    keeps_lora = True
    lora_targets = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_q", "to_v", "to_out.0")

    def __init__(
        self,
        path: str | Path,
        vae: str | Path | None = None,
        resolution: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(path, vae, dtype)
        self.config = part_config(SD3Transformer2DModel, self.path, "transformer")
        side = check_resolution(self.config, self.vae_factor, resolution) // self.vae_factor
        self.latent_shape = (self.config["in_channels"], side, side)
        self.max_tokens = 128 if max_tokens is None else max_tokens
        if not 1 <= self.max_tokens <= 512:
            raise ValueError(f"max_tokens {max_tokens} is not in 1 to 512, the length of T5's sequence")
        self.process = FlowMatching(t_end=T_END)
        config = part_config(FlowMatchEulerDiscreteScheduler, self.path, "scheduler")
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.shift: float = self.scheduler.shift
        self.text: Callable[[Sequence[str]], Condition] = TextEncoders(self.path, self.max_tokens, dtype)
        self._null: tuple[Any, Condition] | None = None

    def to(self, device: torch.device | str) -> "SD3":
        if isinstance(self.text, TextEncoders):
            self.text.to(device)
        self._null = None
        return super().to(device)

    def save_memory(
        self,
        vae_checkpointing: bool = False,
        vae_tiling: bool = False,
        vae_slicing: bool = False,
        offload_text: bool = False,
    ) -> None:
        """See `dmdr_models.family.TextFamily.save_memory`."""
        super().save_memory(vae_checkpointing, vae_tiling, vae_slicing)
        if not offload_text:
            return
        if not isinstance(self.text, TextEncoders):
            raise ValueError("offload_text: the texts come from elsewhere, there is nothing to offload; leave it out")
        self.text.offload = True

    def load_network(self, weights: str | Path | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        same = {
            name: self.config[name]
            for name in ("in_channels", "out_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")
        }
        return load_transformer(SD3Transformer2DModel, self.path, weights, self.dtype, same)

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        # A LoRANetwork's own parameters may be more exact than those of the network that it adapts.
        dtype = next(getattr(network, "base", network).parameters()).dtype
        texts = {name: value.to(dtype) for name, value in condition.items()}
        timestep = (t.float() * 1000).round().long()  # as integers, which no engine rounds to its own precision
        return network(x_t.to(dtype), timestep=timestep, return_dict=False, **texts, **named)[0].float()

    def condition(self, prompts: Sequence[Any]) -> Condition:
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be a list of texts, got {prompts!r}")
        return {name: value.to(self.device) for name, value in self.text(prompts).items()}

    def null_condition(self, batch: int) -> Condition:
        if self._null is None or self._null[0] is not self.text:
            self._null = self.text, self.condition([""])
        return {name: value.expand(batch, *value.shape[1:]) for name, value in self._null[1].items()}

    def save(self, network: nn.Module, folder: Path) -> None:
        network.save_pretrained(folder / "transformer")  # type: ignore[operator]

    def save_lora(self, network: LoRANetwork, folder: Path) -> None:
        local = Path(self.path).is_dir()
        export.save_lora(network, folder, base=Path(self.path).name if local else self.path)

    def save_scheduler(self, folder: Path, shift: float, stochastic: bool = False) -> None:
        export.save_scheduler(self.scheduler, folder, shift, stochastic)

    def usage(self, folder: Path, sampling: Mapping[str, Any], lora: bool) -> str:
        option = "--adapter" if lora else "--weights"
        code = export.snippet(self.path, str(folder), lora, sampling)
        return f"""    dmdr-generate --model {self.path} {option} {folder} "a photo of a fox in the snow" -o fox.png

Or with diffusers alone, at the times of the training (a plain call with as many steps visits others):

```python
{code}```
"""
