"""The folder of an SDXL, as diffusers' StableDiffusionXLPipeline saves it."""

from dmdr_models.folder.layout import VAES, Layout

LAYOUT = Layout(
    name="sdxl",
    parts={
        "unet": ("UNet2DConditionModel",),
        "vae": VAES,
        "scheduler": (),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    },
    opens="dmdr_models.sdxl.family:SDXL",
    takes="texts",
    predicts="noise",
    checks={"scheduler": "dmdr_models.sdxl.accepted:check_scheduler", "vae": "dmdr_models.sdxl.accepted:check_vae"},
    draws="dmdr_models.sdxl.drawing:SDXLDrawing",
)
