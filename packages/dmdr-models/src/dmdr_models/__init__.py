"""Diffusion models behind one small interface: load, generate, export.

    import dmdr_models
    family = dmdr_models.load("sit", "path/to/model")

`load` opens a model folder, `sample` draws latents, `LoRANetwork` is a LoRA with a strength per call, and `tiny` makes
small models with random weights. `registry` lists the families; `generate` is the program `dmdr-generate`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["LoRANetwork", "load", "sample", "tiny"]

_HOMES = {
    "LoRANetwork": "dmdr_models.networks.lora",
    "load": "dmdr_models.registry",
    "sample": "dmdr_models.drawing.sampling",
}


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import: wait until something is used.
    if name == "tiny":
        return import_module("dmdr_models.tiny")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
