"""The weights of a network as one file. No code in such a file is ever run."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmdr_models.base.atomic_files import write_whole
from dmdr_models.base.reasons import reason
from dmdr_models.folder.checks import STATE_DICTS


def load_state_dict(file: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a `.safetensors` file, or of a `.bin`, `.pt` or `.pth` file that `torch.save` wrote.

    Raises:
        ValueError: the file has another ending, is damaged, or holds something else than tensors by their names.
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
        raise ValueError(f"{file} cannot be read, it may be damaged: {reason(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} holds something else than tensors by their names")
    return state


def save_state_dict(network: nn.Module, file: str | Path) -> None:
    """Write the weights of a network into one file, which `load_state_dict` reads.

    Args:
        file: ends in `.safetensors`, or in `.bin`, `.pt` or `.pth` for one that `torch.load` reads.

    Raises:
        ValueError: it has another ending.
        OSError: it cannot be written.
    """
    file = Path(file)
    if file.suffix not in STATE_DICTS:
        raise ValueError(f"{file} is no name for a state dict: let it end in {', '.join(STATE_DICTS)}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}

    def write(partial: Path) -> Any:
        if file.suffix == ".safetensors":
            return save_file(state, partial, metadata={"format": "pt"})
        return torch.save(state, partial)

    write_whole(file, write)
