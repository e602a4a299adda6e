"""A model's folder: how it is recognised, what it holds, and reading its parts."""
