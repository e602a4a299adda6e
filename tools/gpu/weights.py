"""Random weights that are made on the device, so that a full-size model needs no file and not the CPU's memory."""

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
    """Let diffusers' `from_pretrained` read configs alone: it makes the model on `device`, with random weights.

    Everything that dmdr loads of diffusion models comes through it: networks and VAEs. What it leaves untested is the
    reading of safetensors, and the move of a network from the CPU to the device.
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
    """A module that is built on `device` in `dtype`, and none of whose matrices is zero."""
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
    return nn.Module.to(module, dtype)  # diffusers' own warns of a list that is empty


def draw(tensor: Tensor) -> None:
    """Fill with N(0, 1 / 4n), of n inputs: a little below torch's own start values, and without its zero layers."""
    tensor.normal_(std=0.5 / math.sqrt(tensor[0].numel()))


def random_state(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    """Tensors in float16 on the CPU, for a file: matrices at random, scales 1, biases 0.

    They are drawn on `device`, where that is fast.
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
    """The names and shapes of a module's state dict; it is built without memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


def once(path: Path, write: Callable[[Path], Any]) -> Path:
    """The file or folder at `path`, written if it is not there yet; half of it never has its name."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        write(partial)
        partial.rename(path)
    return path
