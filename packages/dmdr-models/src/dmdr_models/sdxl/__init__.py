"""SDXL: text-conditional noise prediction with diffusers' `UNet2DConditionModel`."""
