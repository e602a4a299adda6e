"""SDXL as a family: texts and the size of the picture in, latents of a 4-channel VAE out.

A model is a folder in diffusers' layout (or its name on the hub), as StableDiffusionXLPipeline saves it. Its UNet
predicts noise at whole timesteps of the process that its scheduler's config describes. It is told how large the picture
is, which follows from its latents, and that nothing is cropped away.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from dmdr_core import TimestepGrid, VariancePreserving
from dmdr_core.base.devices import on_device
from torch import Tensor

from dmdr_models.base.picture_size import Resolution
from dmdr_models.families.network_family import in_own_dtype
from dmdr_models.families.protocols import Condition, Students
from dmdr_models.families.text_family import TextFamily
from dmdr_models.folder.read_parts import part_config
from dmdr_models.sdxl.layout import LAYOUT
from dmdr_models.sdxl.student_scheduler import process_of
from dmdr_models.sdxl.students import SDXLStudents
from dmdr_models.sdxl.text_encoders import SDXLTextEncoders

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out")
FEED_FORWARD = ("net.0.proj", "net.2")
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
TIME_PROJECTIONS = ("time_emb_proj",)
"""In the resnets. The embeddings of time and size themselves (`linear_1`, `linear_2`) are not adapted."""


class SDXL(TextFamily):
    """The SDXL family; see `dmdr_models.families.protocols.Family`.

    Args:
        path: folder or hub name of the whole model. The text encoders may be missing if `text` is replaced.
        vae: folder or hub name of another VAE, such as "madebyollin/taesdxl".
        resolution: side of the picture in pixels, or (height, width) (default: what the UNet was trained for).
        dtype: of networks, text encoders and VAE.

    Raises:
        FileNotFoundError: no such folder or hub name, or a part is missing.
        ValueError: a part is of another class, the scheduler describes another process than one with betas whose noise
            is predicted, or the resolution is impossible.
    """

    layout = LAYOUT
    network_class = UNet2DConditionModel
    lora_pipeline = StableDiffusionXLPipeline
    fixed = ("in_channels", "out_channels", "cross_attention_dim", "projection_class_embeddings_input_dim")
    process: VariancePreserving
    lora_targets = (*ATTENTION, *FEED_FORWARD, *CONVOLUTIONS, *TIME_PROJECTIONS)

    def __init__(
        self,
        path: str | Path,
        vae: str | Path | None = None,
        resolution: Resolution | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(path, SDXLTextEncoders(str(path), dtype), vae, resolution, dtype)
        self.scheduler_config = part_config(DDPMScheduler, self.path, "scheduler", classes=())
        self.layout.check_config("scheduler", self.scheduler_config)
        ddpm: Any = DDPMScheduler(**process_of(self.scheduler_config))
        self.process = VariancePreserving(ddpm.alphas_cumprod)
        try:
            config = StableDiffusionXLPipeline.load_config(self.path)
        except OSError:  # a folder of parts, without a pipeline's config
            config = {}
        self.zero_null: bool = config.get("force_zeros_for_empty_prompt", True)
        """Whether the unconditional embeddings are zeros, instead of those of the empty text."""

    @property
    def students(self) -> Students:
        return SDXLStudents(self)

    def grid(self, steps: int, shift: float = 1.0) -> TimestepGrid:
        if shift != 1:
            raise ValueError(f"shift {shift:g}: SDXL's times know no shift; use 1")
        return TimestepGrid(steps, len(self.process.alphas_cumprod))

    def to(self, device: torch.device | str) -> Any:
        self.process = VariancePreserving(self.process.alphas_cumprod.to(device))
        return super().to(device)

    def predict(self, network: Any, x_t: Tensor, t: Tensor, condition: Condition, **named: Any) -> Tensor:
        x_t, asked = in_own_dtype(network, x_t, condition)
        height, width = (side * self.factor for side in x_t.shape[-2:])
        asked["time_ids"] = time_ids(height, width, x_t.device).expand(len(x_t), -1)
        texts = asked.pop("encoder_hidden_states")
        return network(x_t, t, encoder_hidden_states=texts, added_cond_kwargs=asked, return_dict=False, **named)[
            0
        ].float()

    def use_empty_text(self) -> None:
        self.zero_null = False

    def null_condition(self, batch: int) -> Condition:
        null = super().null_condition(batch)
        if not self.zero_null:
            return null
        return {name: torch.zeros_like(value) for name, value in null.items()}


@cache
def time_ids(height: int, width: int, device: torch.device) -> Tensor:
    """What the UNet is told of the picture's size: original size, crop from top left, target size; `[1, 6]` int64.

    They are whole numbers, which no engine rounds to its own precision.
    """
    return on_device(torch.tensor([[height, width, 0, 0, height, width]]), device)
