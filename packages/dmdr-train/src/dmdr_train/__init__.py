"""Distil a diffusion model to a few steps and align it with rewards: recipes, trainer, evaluation, export."""

__version__ = "0.1.0"
