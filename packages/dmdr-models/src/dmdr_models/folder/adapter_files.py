"""The file of a LoRA and its layout: PEFT's folder, or one file in diffusers' or kohya's layout. Imports no torch."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmdr_models.base.json_files import parse_json, read_json
from dmdr_models.folder.safetensors_header import read_header, read_metadata
from dmdr_models.folder.weight_files import PICKLES

CONFIG, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS = (
    "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
)  # fmt: skip
PEFT_PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"  # whatever the network
TEXT_ENCODER_PREFIXES = ("text_encoder", "lora_te")
UNKNOWN_STARTS = ("pissa", "olora", "corda", "loftq")  # of these, a saved LoRA fits another base


@dataclass(frozen=True)
class AdapterFiles:
    """The place of a LoRA.

    Attributes:
        weights: the .safetensors file.
        config: PEFT's adapter_config.json; None in diffusers' and kohya's layout.
    """

    weights: Path
    config: dict[str, Any] | None


def find_adapter(path: str | Path) -> AdapterFiles:
    """Find the files of a LoRA.

    Args:
        path: a folder in PEFT's layout, a folder with pytorch_lora_weights.safetensors or a single .safetensors file,
            or a .safetensors file.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: it is something else.
    """
    place = Path(path)
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ValueError(f"{path} is no LoRA that is read: give a folder, or a .safetensors file")
        if place.name != PEFT_WEIGHTS:
            return AdapterFiles(place, None)
        place = place.parent
    if not place.is_dir():
        raise FileNotFoundError(f"no folder {path}, nor such a file")
    if (place / CONFIG).is_file() or any(place.glob("adapter_model.*")):
        for name in (CONFIG, PEFT_WEIGHTS):
            if not (place / name).is_file():
                raise FileNotFoundError(f"{place} holds no {name}")
        return AdapterFiles(place / PEFT_WEIGHTS, _peft_config(place))
    files = sorted(place.glob("*.safetensors"))
    if (place / DIFFUSERS_WEIGHTS).is_file():
        files = [place / DIFFUSERS_WEIGHTS]
    if len(files) > 1:
        raise ValueError(f"{path} holds {files[0].name} and {files[1].name}: give the file instead of the folder")
    if not files:
        pickles = [file.name for file in place.glob("*") if file.suffix in PICKLES]
        found = f"; {pickles[0]} is a pickle, which is not read" if pickles else ""
        raise FileNotFoundError(f"{path} holds no {CONFIG}, nor a LoRA in one .safetensors file{found}")
    return AdapterFiles(files[0], None)


def step_folder(step: int) -> str:
    """The sub-folder with the LoRA of a step, of a student whose steps have a LoRA each."""
    return f"step-{step}"


def step_folders(path: str) -> list[str]:
    """The folders of the LoRAs of a student's steps, in their order; none if one LoRA serves all steps."""
    found: list[str] = []
    while (folder := Path(path) / step_folder(len(found))).is_dir():
        found.append(str(folder))
    return found


def check_adapter(path: str | Path, layers: Collection[str] | None = None, part: str = "") -> None:
    """Check what can be known of a LoRA without torch; `dmdr_models.networks.lora_files.read_lora` checks the rest.

    Args:
        layers: names of the network's layers, if they are known; the LoRA may adapt only these.
        part: the network's sub-folder, the prefix of its layers in diffusers' layout.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: it holds another kind of adapter, or adapts a text encoder, or a layer that the network does not
            have.
    """
    files = find_adapter(path)
    try:
        names = list(read_header(files.weights))
    except ValueError as error:
        raise ValueError(f"{path} is not an adapter: {error}") from error
    check_no_text_encoders(path, names)
    prefix = f"{part}." if files.config is None else PEFT_PREFIX
    adapted = [name.removeprefix(prefix).split(".lora_A.")[0] for name in names if ".lora_A." in name]
    if not any("lora" in name for name in names):
        raise ValueError(f"{path} adapts no layer")
    for layer in adapted:
        if layers is not None and layer not in layers:
            raise ValueError(f"{path} adapts {layer}, which the network does not have")


def check_no_text_encoders(path: str | Path, names: Iterable[str]) -> None:
    """Check that a LoRA leaves the text encoders as they are: dmdr applies LoRAs to the network alone.

    Args:
        path: of the LoRA, for the message.
        names: of its tensors.

    Raises:
        ValueError: one is for a text encoder.
    """
    found = [name for name in names if name.startswith(TEXT_ENCODER_PREFIXES)]
    if found:
        raise ValueError(
            f"{path} also adapts text encoders, with {len(found)} tensors such as {found[0]}, and dmdr applies LoRAs "
            f"to the network alone: save the file without the tensors whose names begin with "
            f"{' or '.join(TEXT_ENCODER_PREFIXES)}"
        )


def adapter_ranks(path: str | Path) -> set[int]:
    """The ranks of a LoRA's layers, from the shapes in its file's header.

    Layers that are query, key and value in one are left out: their rank may be the sum of the ranks of three adapters.

    Raises:
        FileNotFoundError, ValueError: as for `find_adapter`.
    """
    down = (".lora_A.", "lora_down.", "lora.down.")
    header = read_header(find_adapter(path).weights)
    return {
        entry["shape"][0]
        for name, entry in header.items()
        if any(mark in name for mark in down) and entry["shape"] and "_qkv." not in name
    }


def diffusers_config(files: AdapterFiles, part: str) -> dict[str, Any]:
    """The entries that diffusers writes of PEFT's config into the header of its file; empty if it wrote none."""
    text = read_metadata(files.weights).get("lora_adapter_metadata")
    if not isinstance(text, str):
        return {}
    entries = parse_json(text.encode(), f"lora_adapter_metadata in {files.weights}")
    prefix = f"{part}."
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}


def _peft_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG)
    except ValueError as error:
        raise ValueError(f"{folder} is not an adapter: {error}") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds a {kind} adapter, not a LORA")
    if config.get("megatron_config"):  # peft would import the module that the file names
        raise ValueError(f"{folder} is an adapter for Megatron, which is not supported")
    if config.get("use_dora"):
        raise ValueError(f"{folder} is a DoRA, which is not supported: give a LoRA")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(UNKNOWN_STARTS):
        raise ValueError(f"{folder} was started by {start}, which changes the base: save it with PEFT as a plain LoRA")
    return config
