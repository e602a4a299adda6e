"""What a folder or a file must be before it is read: the right class, no pickle, no other code. Imports no torch."""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dmdr_models.base.errors import SizeError
from dmdr_models.base.json_files import first, read_json
from dmdr_models.base.picture_size import size_text
from dmdr_models.folder.layout import Layout
from dmdr_models.folder.quantisation import check_readable, method_of
from dmdr_models.folder.safetensors_header import layers_in
from dmdr_models.folder.weight_files import weight_files

STATE_DICTS = (".safetensors", ".bin", ".pt", ".pth")
"""The endings of a file that holds a network's state dict and nothing else."""


def check_part(path: str | Path, part: str, expected: Sequence[str], quantised: bool = False) -> None:
    """Check one part of a local model folder; a hub name (`owner/name`, and no such folder here) passes.

    Args:
        part: the sub-folder; "" for `path` itself.
        expected: names of the classes that it may hold; an empty sequence accepts any class.
        quantised: accept quantised weights, if the library that reads them is installed.

    Raises:
        FileNotFoundError: the folder or its part is missing.
        ValueError: the part is of another class, its weights are no safetensors or are quantised, or `path` is a
            single file.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} is a file, not a folder in diffusers' layout")
    if not folder.is_dir():
        if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
            raise FileNotFoundError(f"no model folder {path}")
        return
    config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not config.is_file():
        raise FileNotFoundError(f"{path} holds no {config.relative_to(folder)}")
    try:
        read = read_json(config)
    except ValueError as error:
        raise ValueError(f"{config} is not a model's config: {error}") from error
    found = read.get("_class_name") or first(read.get("architectures"))  # diffusers' and transformers'
    check_class(folder / part, found, expected)
    if part != "scheduler":
        if (method := method_of(read)) is not None:
            _check_quantised(config, method, quantised)
        weight_files(folder / part)


def check_tokenizer(path: str | Path, part: str) -> None:
    """Check that a local folder holds the tokenizer of a text encoder, with its vocabulary.

    Without one, transformers makes a tokenizer with a vocabulary of its own, and says nothing.

    Args:
        part: the text encoder's sub-folder; the tokenizer's is called alike.

    Raises:
        FileNotFoundError: the folder or a file of the tokenizer is missing.
    """
    name = part.replace("text_encoder", "tokenizer")
    folder = Path(path) / name
    found = {file.name for file in folder.glob("*")}
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} holds no {name}: download the folder again")
    if "tokenizer_config.json" not in found:
        raise FileNotFoundError(f"{folder} holds no tokenizer_config.json: download the folder again")
    whole = "tokenizer.json" in found or any(file.endswith(".model") for file in found)
    if not whole and not {"vocab.json", "merges.txt"} <= found and "vocab.txt" not in found:
        raise FileNotFoundError(f"{folder} holds no vocabulary (tokenizer.json): download the folder again")


def check_class(where: str | Path, found: str | None, expected: Sequence[str]) -> None:
    """Check the name of a class; an empty sequence accepts any.

    Raises:
        ValueError: `found` is none of those expected.
    """
    if expected and found not in expected:
        raise ValueError(f"{where} holds a {found}, not a {' or '.join(expected)}")


def _check_quantised(config: Path, method: str, accepted: bool) -> None:
    if not accepted:
        raise ValueError(
            f"{config} says that the weights are quantised ({method}), which is not supported here: give the folder of "
            "the weights before quantisation"
        )
    check_readable(config, method)


def single_file(file: Path) -> str:
    """What to do with a whole model in one file."""
    if file.suffix != ".safetensors":
        return f"{file} is a file, and a model is a folder in diffusers' layout with its weights as safetensors"
    return (
        f"{file} is a model in one file; make a folder of it once, with the folder BASE of the model that it was "
        f"trained from: python -m dmdr_models.unpack {shlex.quote(str(file))} BASE FOLDER"
    )


def check_index(folder: Path) -> None:
    """Check that a folder's model_index.json names no classes of other libraries: their code would be run.

    Raises:
        ValueError: names the first such part.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        return
    try:
        named = {name: first(entry) for name, entry in read_json(path).items() if isinstance(entry, list)}
    except ValueError as error:
        raise ValueError(f"{path} is not a pipeline's config: {error}") from error
    for name, library in named.items():
        if library not in (None, "diffusers", "transformers"):
            raise ValueError(f"{path} asks for other code: {name} is of {library!r}, not diffusers or transformers")


def check_size(layout: Layout, network: dict[str, Any], factor: int, height: int, width: int) -> None:
    """Check that a network can draw pictures of this size.

    Args:
        network: its config.
        factor: pixels per latent, along a side.
        height, width: in pixels.

    Raises:
        SizeError: a side is not a multiple of decoder and patches, or larger than the network's position table; or
            the network draws another size only. The message names the nearest side.
    """
    if not layout.one_size:
        for side in (height, width):
            _check_side(network, factor, side)
        return
    own = network["sample_size"] * factor
    if (height, width) != (own, own):
        asked = size_text((height, width))
        raise SizeError(f"resolution {asked}: this {layout.name} model draws {own} pixels only; leave it out")


def _check_side(network: dict[str, Any], factor: int, side: int) -> None:
    step = factor * network.get("patch_size", 1)
    most = step * network.get("pos_embed_max_size", side)
    if not step <= side <= most and "pos_embed_max_size" in network:
        raise SizeError(
            f"resolution {side} is not in {step} to {most}, which the model's position table holds: "
            f"give {step if side < step else most}"
        )
    if side < step or side % step:
        nearest = max(step, (side + (step - 1) // 2) // step * step)  # the smaller of two that are as near
        raise SizeError(f"resolution {side} is not a multiple of {step} (VAE times patch): give {nearest}")


def check_weights(layout: Layout, path: str | Path, layers: Collection[str] | None = None) -> None:
    """Check that a path is a folder with a network of this family, or the file of a state dict.

    Args:
        layers: names of the layers of the network that takes these weights, if they are known; a .safetensors file
            must hold exactly these.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder holds no network.
        ValueError: it is something else.
    """
    path, part = Path(path), layout.network_part
    if path.is_dir():
        check_part(path, part if (path / part).is_dir() else "", layout.network_classes)
        return
    if not path.exists():
        raise FileNotFoundError(f"no model folder {path}, nor such a file")
    if path.suffix not in STATE_DICTS:
        raise ValueError(f"{path} is no state dict: give a file that ends in {', '.join(STATE_DICTS)}")
    if path.suffix == ".safetensors":
        try:
            found = set(layers_in(path))
        except ValueError as error:
            raise ValueError(f"{path} is no safetensors file") from error
        if layers and not found & set(layers):
            raise ValueError(
                f"{path} names no layer as diffusers does: give a network that diffusers saved, or make a folder of a "
                f"whole model in one file: python -m dmdr_models.unpack {shlex.quote(str(path))} BASE FOLDER"
            )
        if layers:
            check_names(path, found, layers)


def check_names(where: str | Path, found: Collection[str], expected: Collection[str]) -> None:
    """Check that the names found are those expected.

    Raises:
        ValueError: names the first that is missing or unknown.
    """
    for fault, names in (
        ("lacks", [name for name in expected if name not in found]),
        ("holds the unknown", [name for name in found if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{where} {fault} {names[0]}{more}")
