"""The folder of a Stable Diffusion 3 or 3.5, as diffusers' StableDiffusion3Pipeline saves it."""

from dmdr_models.folder.layout import VAES, Layout

MAX_TOKENS = 128
"""Length of T5's sequence, unless a recipe says otherwise."""

LAYOUT = Layout(
    name="sd3",
    parts={
        "transformer": ("SD3Transformer2DModel",),
        "vae": VAES,
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
    },
    opens="dmdr_models.sd3.family:SD3",
    takes="texts",
    checks={"scheduler": "dmdr_models.sd3.accepted:check_scheduler", "vae": "dmdr_models.sd3.accepted:check_vae"},
    max_tokens=MAX_TOKENS,
    optional=("text_encoder_3",),
    reads_kohya="dmdr_models.sd3.original_layout:read_kohya",
    draws="dmdr_models.sd3.drawing:SD3Drawing",
)
