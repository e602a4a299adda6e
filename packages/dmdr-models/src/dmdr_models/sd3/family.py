"""Stable Diffusion 3 and 3.5 as a family: texts in, latents of a 16-channel VAE out.

A model is a folder in diffusers' layout (or its name on the hub), as StableDiffusion3Pipeline saves it. SD3-Medium,
SD3.5-Medium and SD3.5-Large differ only in their transformer's config.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from dmdr_core import FlowMatching
from torch import Tensor

from dmdr_models.base.errors import LengthError
from dmdr_models.base.picture_size import Resolution
from dmdr_models.families.network_family import in_own_dtype
from dmdr_models.families.protocols import Condition, Students
from dmdr_models.families.text_family import TextFamily
from dmdr_models.folder.read_parts import part_config
from dmdr_models.sd3.layout import LAYOUT, MAX_TOKENS
from dmdr_models.sd3.students import SD3Students
from dmdr_models.sd3.text_encoders import SD3TextEncoders
from dmdr_models.sd3.times import T_END

PROJECTIONS = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_q", "to_v", "to_out.0")
"""Of the joint attention, `attn`, of both streams. SD3.5-Medium's second attention, `attn2`, is not adapted."""


class SD3(TextFamily):
    """The SD3 family; see `dmdr_models.families.protocols.Family`.

    Args:
        path: folder or hub name of the whole model. The text encoders may be missing if `text` is replaced.
        vae: folder or hub name of another VAE.
        resolution: side of the picture in pixels, or (height, width) (default: what the transformer was trained for).
        max_tokens: length of the T5 sequence, at most 512 (default: 128).
        dtype: of networks, text encoders and VAE.

    Raises:
        FileNotFoundError: no such folder or hub name, or a part is missing.
        SizeError, LengthError: the resolution, or the length, is impossible.
        ValueError: a part is of another class.
    """

    layout = LAYOUT
    network_class = SD3Transformer2DModel
    lora_pipeline = StableDiffusion3Pipeline
    fixed = ("in_channels", "out_channels", "patch_size", "joint_attention_dim", "pooled_projection_dim")
    process = FlowMatching(t_end=T_END)
    lora_targets = tuple(f"attn.{projection}" for projection in PROJECTIONS)

    def __init__(
        self,
        path: str | Path,
        vae: str | Path | None = None,
        resolution: Resolution | None = None,
        max_tokens: int = MAX_TOKENS,
        dtype: torch.dtype = torch.float32,
    ):
        self.max_tokens = max_tokens
        network = part_config(SD3Transformer2DModel, str(path), "transformer", quantised=True)
        text = SD3TextEncoders(str(path), max_tokens, network["joint_attention_dim"], dtype)
        super().__init__(path, text, vae, resolution, dtype)
        if not 1 <= max_tokens <= 512:
            raise LengthError(
                f"max_tokens {max_tokens} is not in 1 to 512, the length of T5's sequence: give at most 512"
            )
        config = part_config(FlowMatchEulerDiscreteScheduler, self.path, "scheduler")
        self.layout.check_config("scheduler", config)
        self.shift = config.get("shift", 1.0)

    @property
    def students(self) -> Students:
        return SD3Students(self)

    def timestep(self, t: Tensor) -> Tensor:
        """See `NetworkFamily.timestep`; as integers, which no engine rounds to its own precision."""
        return (t.float() * 1000).round().long()

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        x_t, texts = in_own_dtype(network, x_t, condition)
        return network(x_t, timestep=self.timestep(t), return_dict=False, **texts, **named)[0].float()
