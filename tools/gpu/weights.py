"""Make random weights on the device, so that a full-size model needs neither files nor the CPU's memory."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dmdr_train.planning.meta_models import built_from_configs, default_dtype
from torch import Tensor, nn


def random_weights(device: torch.device) -> AbstractContextManager[None]:
    """Make diffusers' `from_pretrained` read only configs, and build the model on `device` with random weights.

    dmdr loads all networks and VAEs of diffusion models with this method. Reading safetensors and moving a network from
    the CPU to the device are therefore not tested.
    """
    return built_from_configs(partial(made, device=device))


def made(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Build a module on `device` in `dtype` and fill all its matrices with random numbers, so that none is zero."""
    with torch.device(device), default_dtype(dtype):
        module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                draw(parameter)
    return nn.Module.to(module, dtype)  # diffusers' own method warns about an empty list


def draw(tensor: Tensor) -> None:
    """Fill a tensor of n inputs with N(0, 1 / 4n), slightly less than torch's own initial values."""
    tensor.normal_(std=0.5 / math.sqrt(tensor[0].numel()))


def random_state(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    """Return float16 tensors on the CPU, for a file: random matrices, scales 1, biases 0.

    They are drawn on `device`, which is faster.
    """
    state = {}
    for name, shape in shapes.items():
        tensor = torch.zeros(shape, device=device)
        if name.endswith("logit_scale"):
            tensor.fill_(math.log(100))
        elif len(shape) > 1:
            draw(tensor)
        elif name.endswith(("weight", "gamma", "lambda1")):
            tensor.fill_(1)
        state[name] = tensor.half().cpu()
    return state


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a module's state dict; the module is built without memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def once(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write the file or folder at `path` unless it exists, and return the path; the write is atomic."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        write(partial)
        partial.rename(path)
    return path
