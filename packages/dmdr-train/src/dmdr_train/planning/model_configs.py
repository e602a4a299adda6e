"""The published configurations of the well-known models, as diffusers' folders hold them."""

from pathlib import Path
from typing import Any

from dmdr_models.sit.transformer import preset

Config = dict[str, Any]

SD3_SCHEDULER: Config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
SDXL_SCHEDULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def sd3(layers: int, **more: Any) -> Config:
    """The transformer of Stable Diffusion 3: as many heads of 64 as layers."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "num_attention_heads": layers,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * layers,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        **more,
    }


def autoencoder(**more: Any) -> Config:
    """The VAE of SD, SDXL and SD3; these differ only in the number of channels and the constants."""
    return {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        **more,
    }


SD3_VAE = autoencoder(
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    sample_size=1024,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TAESD: Config = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [64] * 4,
    "decoder_block_out_channels": [64] * 4,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_channels": 4,
    "scaling_factor": 1.0,
}
SIT_XL_2: Config = {
    "_class_name": "SiTTransformer",
    "in_channels": 4,
    "sample_size": 32,
    "num_classes": 1000,
    **preset("SiT-XL/2"),
}

FOLDERS: dict[str, dict[str, Config]] = {
    "sd3-medium": {"transformer": sd3(24), "vae": SD3_VAE, "scheduler": SD3_SCHEDULER},
    "sd35-large": {"transformer": sd3(38, qk_norm="rms_norm"), "vae": SD3_VAE, "scheduler": SD3_SCHEDULER},
    "sd35-medium": {
        "transformer": sd3(24, qk_norm="rms_norm", dual_attention_layers=list(range(13)), pos_embed_max_size=384),
        "vae": SD3_VAE,
        "scheduler": SD3_SCHEDULER,
    },
    "sdxl-base": {
        "unet": UNET,
        "vae": autoencoder(latent_channels=4, scaling_factor=0.13025, sample_size=1024),
        "scheduler": SDXL_SCHEDULER,
    },
    "taesdxl": {"": TAESD},
    "sit-xl-2": {"transformer": SIT_XL_2},
    "sd-vae-ft-ema": {"": autoencoder(latent_channels=4, scaling_factor=0.18215, sample_size=256)},
}
"""Model folder -> its parts ("" for the folder itself) and their configs."""

HUB_NAMES = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd35-large",
    "stabilityai/stable-diffusion-3.5-medium": "sd35-medium",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl-base",
    "madebyollin/taesdxl": "taesdxl",
    "stabilityai/sd-vae-ft-ema": "sd-vae-ft-ema",
}
"""The names in `FOLDERS` of models on the hub."""

CLIP_L: Config = {
    "_class_name": "CLIPTextModelWithProjection",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
CLIP_G: Config = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL: Config = {
    "_class_name": "T5EncoderModel",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
TEXT_ENCODERS: dict[str, dict[str, Config]] = {
    "sd3": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    "sdxl": {"text_encoder": {**CLIP_L, "_class_name": "CLIPTextModel"}, "text_encoder_2": CLIP_G},
}
"""The text encoders of a family, by part."""


def known(path: str) -> dict[str, Config] | None:
    """The configs of a well-known model by part, by its name on the hub or the last part of a path; None if unknown."""
    return FOLDERS.get(HUB_NAMES.get(path, Path(path).name))
