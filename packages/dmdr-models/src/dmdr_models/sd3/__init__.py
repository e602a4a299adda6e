"""Stable Diffusion 3 and 3.5: text-conditional flow matching with diffusers' `SD3Transformer2DModel`."""
