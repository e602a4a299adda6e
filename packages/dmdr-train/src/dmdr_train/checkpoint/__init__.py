"""Checkpoints: saving, loading, finding, and comparing them with a recipe."""
