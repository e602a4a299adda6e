"""Reading the parts of a model folder, or of a name on the hub, with errors that say what is wrong with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmdr_models.describe import check_part


def part_config(model: Any, path: str, part: str) -> dict[str, Any]:
    """The config of one part of a model; no weights are read.

    Args:
        model: the part's class in diffusers, such as `AutoencoderKL`.
        path: folder or hub name.
        part: its sub-folder; "" for `path` itself.

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks the part.
        ValueError: the part is of another class.
    """
    check_part(path, part, model.__name__)
    try:
        return model.load_config(path, subfolder=part or None)
    except OSError as error:
        raise FileNotFoundError(f"{path} is no folder here, nor a model on the hub that can be read") from error


def load_transformer(
    model: Any, path: str, weights: str | Path | None, dtype: torch.dtype, same: Mapping[str, Any] | None = None
) -> nn.Module:
    """A new network from `path`/transformer, or from the folder `weights`, in eval mode.

    Args:
        model: its class in diffusers' style.
        weights: a local folder that holds the network, itself or as `transformer/`.
        same: what its config must say, to stand in for the family's own.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: another model, or weights that do not fit their config or the family's.
    """
    part = "transformer"
    if weights is not None:
        path = str(weights)
        part = "transformer" if (Path(weights) / "transformer").is_dir() else ""
        if not Path(weights).is_dir():
            raise FileNotFoundError(f"no folder {weights}")
    check_part(path, part, model.__name__)
    network, faults = model.from_pretrained(
        path, subfolder=part or None, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    found = "; ".join(f"{fault}: {', '.join(map(str, names))}" for fault, names in faults.items() if names)
    if found:
        raise ValueError(f"the weights in {path} do not fit their config: {found}")
    for name, value in (same or {}).items():
        if network.config[name] != value:
            raise ValueError(f"{path} has {name} {network.config[name]}, the model {value}")
    return network.eval()
