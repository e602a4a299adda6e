"""Reading the parts of a model folder, or of a name on the hub, with errors that say what is wrong with it."""

import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmdr_models.folder.contents import STATE_DICTS, VAES, check_class, check_names, check_part

# An AutoencoderTiny saves block_out_channels in its config, and warns of it when it is loaded.
logging.getLogger("diffusers.configuration_utils").addFilter(
    lambda record: "{'block_out_channels'" not in record.getMessage()
)


def part_config(model: Any, path: str, part: str, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """The config of one part of a model; no weights are read.

    Args:
        model: the part's class in diffusers, such as `AutoencoderKL`.
        path: folder or hub name.
        part: its sub-folder; "" for `path` itself.
        classes: names of those that will do (default: `model` alone; none stands for any).

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks the part.
        ValueError: the part is of another class.
    """
    expected = (model.__name__,) if classes is None else classes
    check_part(path, part, expected)
    try:
        config = model.load_config(path, subfolder=part or None)
    except OSError as error:
        raise FileNotFoundError(f"{path} is no folder here, nor a model on the hub that can be read") from error
    check_class(f"{path} {part}".rstrip(), config.get("_class_name"), expected)
    return config


def load_vae(path: str, part: str, dtype: torch.dtype) -> Any:
    """An AutoencoderKL or AutoencoderTiny, in eval mode.

    Args:
        path: folder or hub name.
        part: its sub-folder; "" for `path` itself.

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks the part.
        ValueError: the part is of another class.
    """
    kind = part_config(diffusers.AutoencoderKL, path, part, VAES)["_class_name"]
    vae = getattr(diffusers, kind).from_pretrained(
        path, subfolder=part or None, torch_dtype=dtype, use_safetensors=True
    )
    return vae.eval()


def load_network(
    model: Any,
    path: str,
    part: str,
    weights: str | Path | None,
    dtype: torch.dtype,
    same: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A new network in eval mode: from `path`/`part`, or from the folder or the file `weights`.

    Args:
        model: its class in diffusers' style.
        part: the network's sub-folder, such as "transformer".
        weights: a local folder that holds the network, itself or as `part`; or a file with a state dict for the config
            in `path`, see `load_state_dict`.
        same: what its config must say, to stand in for the family's own.

    Raises:
        FileNotFoundError: a folder or file is missing.
        ValueError: another model, or weights that do not fit their config or the family's.
    """
    if weights is not None and Path(weights).is_file():
        from accelerate import init_empty_weights  # slow: it looks for accelerators

        with init_empty_weights():
            network = model.from_config(part_config(model, path, part))
        fill(network, load_state_dict(weights), dtype, str(weights))
        return network.eval()
    if weights is not None:
        path = str(weights)
        part = part if (Path(weights) / part).is_dir() else ""
        if not Path(weights).is_dir():
            raise FileNotFoundError(f"no folder {weights}, nor such a file")
    check_part(path, part, (model.__name__,))
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


def fill(network: nn.Module, state: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Make copies of `state` in `dtype` the weights of a network, all of them; `state` is used up.

    Args:
        network: its own weights may be without memory.
        where: the state comes from, for errors.

    Raises:
        ValueError: names the first weight that is missing, unknown or of another shape.
    """
    expected = network.state_dict()
    check_names(where, state, expected)
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{where} holds {name} {tuple(state[name].shape)}, the network {tuple(tensor.shape)}")
    # Always copies: kernels round otherwise where memory is not aligned, which that of a file's tensors may not be.
    network.load_state_dict({name: state.pop(name).to(dtype, copy=True) for name in expected}, assign=True)


def load_state_dict(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of what `torch.save` wrote; no code in it is ever run.

    Raises:
        ValueError: it ends otherwise, is damaged, or holds something else than tensors by their names.
    """
    file = Path(file)
    if file.suffix not in STATE_DICTS:
        raise ValueError(f"{file} is no state dict: give a file that ends in {', '.join(STATE_DICTS)}")
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is damaged, or holds more than tensors and could run code: it is not read") from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read, it may be damaged: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} holds something else than tensors by their names")
    return state


def save_state_dict(network: nn.Module, file: str | Path) -> None:
    """Write the weights of a network into one file, which `load_state_dict` reads; it is either complete or not there.

    Args:
        file: ends in `.safetensors`, or else in `.bin`, `.pt` or `.pth` for one that `torch.load` reads.

    Raises:
        ValueError: it ends otherwise.
        OSError: it cannot be written.
    """
    file = Path(file)
    if file.suffix not in STATE_DICTS:
        raise ValueError(f"{file} is no name for a state dict: let it end in {', '.join(STATE_DICTS)}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        if file.suffix == ".safetensors":
            save_file(state, partial, metadata={"format": "pt"})
        else:
            torch.save(state, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
