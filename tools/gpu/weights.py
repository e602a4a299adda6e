"""Make random weights on the device, so that a full-size model needs neither files nor the CPU's memory."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn


@contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Make diffusers' `from_pretrained` read only configs, and build the model on `device` with random weights.

    dmdr loads all networks and VAEs of diffusion models with this method. Reading safetensors and moving a network from
    the CPU to the device are therefore not tested.
    """

    def from_pretrained(
        kind: Any,
        path: str,
        subfolder: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        output_loading_info: bool = False,
        **_: Any,
    ) -> Any:
        config = kind.load_config(path, subfolder=subfolder)
        model = made(lambda: kind.from_config(config), torch_dtype, device)
        return (model, {}) if output_loading_info else model

    with mock.patch.object(diffusers.ModelMixin, "from_pretrained", classmethod(from_pretrained)):
        yield


def made(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Build a module on `device` in `dtype` and fill all its matrices with random numbers, so that none is zero."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = make()
    finally:
        torch.set_default_dtype(before)
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
