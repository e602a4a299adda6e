"""Diffusion models behind one small interface: load, generate, export.

    import dmdr_models
    family = dmdr_models.load("sit", "path/to/model")

Modules: `family` (the interface), `sampling`, `lora`, `tiny` (random-weight models for tests), and one folder per
family.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "sample", "tiny"]

_HOMES = {"load": "dmdr_models.families.protocols", "sample": "dmdr_models.drawing.sampling"}


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import: wait until something is used.
    if name == "tiny":
        return import_module("dmdr_models.tiny")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
