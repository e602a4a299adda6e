"""Reading the parts of a model folder, or of a name on the hub. Each error says what is wrong with the part."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dmdr_models.base.reasons import reason
from dmdr_models.folder.checks import check_class, check_names, check_part
from dmdr_models.folder.layout import VAES
from dmdr_models.folder.quantisation import check_readable, method_of
from dmdr_models.folder.state_dicts import load_state_dict
from dmdr_models.folder.weight_files import weight_files

# An AutoencoderTiny saves block_out_channels in its config, and warns of it when it is loaded.
logging.getLogger("diffusers.configuration_utils").addFilter(
    lambda record: "{'block_out_channels'" not in record.getMessage()
)


def part_config(
    model: Any, path: str, part: str, classes: Sequence[str] | None = None, quantised: bool = False
) -> dict[str, Any]:
    """The config of one part of a model; no weights are read.

    Args:
        model: the part's class in diffusers, such as `AutoencoderKL`.
        path: folder or hub name.
        part: its sub-folder; "" for `path` itself.
        classes: names of the classes that the part may have (default: `model` alone); an empty sequence accepts any.
        quantised: accept quantised weights, if the library that reads them is installed.

    Raises:
        FileNotFoundError: no such folder or hub name, or it lacks the part.
        ValueError: the part is of another class.
    """
    expected = (model.__name__,) if classes is None else classes
    check_part(path, part, expected, quantised)
    try:
        config = model.load_config(path, subfolder=part or None)
    except OSError as error:
        raise FileNotFoundError(f"{path} is no folder here, nor a model on the hub that can be read") from error
    check_class(f"{path} {part}".rstrip(), config.get("_class_name"), expected)
    if quantised and (method := method_of(config)) is not None:
        check_readable(path, method)
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
        path, subfolder=part or None, torch_dtype=dtype, use_safetensors=True, variant=variant(path, part)
    )
    return vae.eval()


def load_text_encoder(path: str, part: str, classes: Sequence[str], dtype: torch.dtype) -> Any:
    """A text encoder of transformers, in eval mode.

    Args:
        path: folder or hub name.
        part: its sub-folder.
        classes: names of the classes that it may have; it is opened as the first.

    Raises:
        FileNotFoundError: no such folder, or it lacks the part.
        ValueError: the part is of another class.
    """
    import transformers

    check_part(path, part, classes)
    encoder = getattr(transformers, classes[0]).from_pretrained(
        path, subfolder=part, dtype=dtype, use_safetensors=True, variant=variant(path, part)
    )
    return encoder.eval()


def variant(path: str, part: str) -> str | None:
    """The variant of the weights in a local folder's part; None for plain weights and for a hub name."""
    folder = Path(path) / part
    return weight_files(folder).variant if folder.is_dir() else None


def load_network(
    model: Any,
    path: str,
    part: str,
    weights: str | Path | None,
    dtype: torch.dtype,
    same: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Read a network, in eval mode: from `path`/`part`, or from the folder or the file `weights`.

    The weights in `path` may be quantised, if the library that reads them is installed.

    Args:
        model: its class in diffusers' style.
        part: the network's sub-folder, such as "transformer".
        weights: a local folder that holds the network, itself or as `part`; or a file with a state dict for the config
            in `path`, see `load_state_dict`.
        same: entries that the config of `weights` must have in common with the model's.

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
    check_part(path, part, (model.__name__,), quantised=weights is None)
    quantised = method_of(model.load_config(path, subfolder=part or None))
    try:
        network, faults = model.from_pretrained(
            path,
            subfolder=part or None,
            torch_dtype=dtype,
            use_safetensors=True,
            variant=variant(path, part),
            output_loading_info=True,
        )
    except Exception as error:  # the libraries raise any, such as where weights of bitsandbytes are read without a GPU
        if quantised is None:
            raise
        raise ValueError(
            f"{path} has quantised weights ({quantised}) that cannot be read here: {reason(error)}; give the folder of "
            "the weights before quantisation"
        ) from error
    found = "; ".join(f"{fault}: {', '.join(map(str, names))}" for fault, names in faults.items() if names)
    if found:
        raise ValueError(f"the weights in {path} do not fit their config: {found}")
    for name, value in (same or {}).items():
        if network.config[name] != value:
            raise ValueError(f"{path} has {name} {network.config[name]}, the model {value}")
    return network.eval()


def fill(network: nn.Module, state: dict[str, Tensor], dtype: torch.dtype, where: str) -> None:
    """Replace all weights of a network by copies of `state` in `dtype`; `state` is emptied.

    Args:
        network: its own weights may be on the meta device.
        where: the place that `state` was read from, for errors.

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
