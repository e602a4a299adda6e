"""Checkpoints: save, load and find them, and compare them with a recipe."""
