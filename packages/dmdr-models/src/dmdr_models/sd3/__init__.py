"""Stable Diffusion 3 and 3.5: text-conditional flow matching with diffusers' `SD3Transformer2DModel`."""

T_END = 0.001
"""Where sampling ends. A stock pipeline goes on to 0 in its last step; the pictures do not differ to the eye."""
