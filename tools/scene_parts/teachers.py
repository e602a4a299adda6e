"""The teachers: a small SD3 and a small SDXL."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from dmdr_core import FlowMatching, VariancePreserving, denoising_loss
from small_models import (
    Training,
    batches,
    encode,
    report,
    save,
)
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from scene_parts.drawn_pictures import CAPTIONS, HOME, NUM_PICTURES, load_vae, pictures
from scene_parts.text_encoders import clip_tokenizer, conditions, look_back, random_clip


def make_teacher(steps: int, snapshots: Path | None) -> None:
    """Train by flow matching with averaged weights and logit-normal times (arXiv 2403.03206), at which shapes form."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        caption_projection_dim=96,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    training = Training(model, "transformer_blocks.", steps)
    process = FlowMatching()
    images, index = pictures(NUM_PICTURES, seed=7)
    latents = encode(load_vae(), images)
    text, pooled = conditions([*CAPTIONS, ""])
    noise = torch.Generator().manual_seed(8)
    start = time.time()
    for step, (x0, caption) in enumerate(batches(latents, index, size=64, steps=steps, seed=9)):
        epsilon = torch.randn(x0.shape, generator=noise)
        t = torch.randn(len(x0), generator=noise).sigmoid()
        caption = torch.where(torch.rand(len(caption), generator=noise) < 0.1, len(CAPTIONS), caption)
        noisy = process.add_noise(x0, epsilon, t)
        velocity = model(noisy, text[caption], pooled[caption], t * 1000).sample
        loss = denoising_loss(velocity, process.target(x0, epsilon, t))
        training.step(loss)
        report("teacher", step, steps, start, loss)
        if snapshots and (step + 1) % 1000 == 0:
            save(training.average.module, snapshots / f"{step + 1}")
    save(training.average.module, HOME / "teacher/transformer")


def make_teacher_sdxl(steps: int, snapshots: Path | None) -> None:
    """Train noise prediction with averaged weights; noise levels and their weights equal the SD3 teacher's."""
    pipeline = sdxl_pipeline()
    training = Training(pipeline.unet, "block", steps)
    process = VariancePreserving(pipeline.scheduler.alphas_cumprod)
    # Noise divided by signal; flow matching's share of noise is t = ratio / (1 + ratio).
    ratio = (1 / process.alphas_cumprod - 1).sqrt()
    images, index = pictures(NUM_PICTURES, seed=7)
    latents = encode(pipeline.vae, images)
    text, pooled = sdxl_conditions(pipeline)
    size = torch.tensor([32.0, 32.0, 0.0, 0.0, 32.0, 32.0])
    noise = torch.Generator().manual_seed(8)
    start = time.time()
    for step, (x0, caption) in enumerate(batches(latents, index, size=64, steps=steps, seed=9)):
        epsilon = torch.randn(x0.shape, generator=noise)
        t = torch.bucketize(torch.randn(len(x0), generator=noise).exp(), ratio).clamp(max=len(ratio) - 1)
        caption = torch.where(torch.rand(len(caption), generator=noise) < 0.1, len(CAPTIONS), caption)
        added = {"text_embeds": pooled[caption], "time_ids": size.expand(len(x0), 6)}
        noisy = process.add_noise(x0, epsilon, t)
        prediction = pipeline.unet(noisy, t, text[caption], added_cond_kwargs=added).sample
        # This equals the error of flow matching's velocity.
        error = (prediction - epsilon) * (1 + ratio[t])[:, None, None, None]
        loss = error.square().mean()
        training.step(loss)
        report("teacher_sdxl", step, steps, start, loss)
        if snapshots and (step + 1) % 1000 == 0:
            save(training.average.module, snapshots / f"{step + 1}")
    pipeline.register_modules(unet=training.average.module)
    pipeline.to(dtype=torch.float16).save_pretrained(HOME / "teacher_sdxl")


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """Return a small SDXL: SDXL's noise schedule, untrained text encoders and UNet, and the SD3 teacher's VAE."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "text_encoder": random_clip(CLIPTextModel, width=32, layers=3, std=0.1),
        "text_encoder_2": random_clip(CLIPTextModelWithProjection, width=64, layers=3, std=0.1),
        "vae": without_shift(load_vae()),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
    }
    torch.manual_seed(5)
    for name in ("text_encoder", "text_encoder_2"):
        look_back(parts[name])
    for name in ("text_encoder", "text_encoder_2", "vae"):
        parts[name] = parts[name].half().float()  # the UNet learns from the rounded weights that are saved
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 80),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 5),
        norm_num_groups=16,
        cross_attention_dim=96,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=64 + 6 * 16,
    )
    return StableDiffusionXLPipeline(unet=unet, **parts, force_zeros_for_empty_prompt=True)


@torch.no_grad()
def without_shift(vae: AutoencoderKL) -> AutoencoderKL:
    """Move the shift of a VAE's latents, which SDXL pipelines ignore, into its biases."""
    shift = vae.config.shift_factor
    vae.quant_conv.bias[: vae.config.latent_channels] -= shift
    vae.post_quant_conv.bias += shift * vae.post_quant_conv.weight.sum(dim=(1, 2, 3))
    vae.register_to_config(shift_factor=None, _name_or_path=None)  # also drops the path of its files
    return vae


@torch.no_grad()
def sdxl_conditions(pipeline: StableDiffusionXLPipeline) -> tuple[Tensor, Tensor]:
    """Return text states `[N, 12, 96]` and pooled text `[N, 64]` of all captions, and a row of zeros for none."""
    parts = [CAPTIONS[i : i + 500] for i in range(0, len(CAPTIONS), 500)]
    encoded = [pipeline.encode_prompt(part, do_classifier_free_guidance=False) for part in parts]
    states, pooled = (torch.cat([part[i] for part in encoded]) for i in (0, 2))
    return F.pad(states, (0, 0, 0, 0, 0, 1)), F.pad(pooled, (0, 0, 0, 1))
