"""What a model folder holds, read from its configs and file headers alone: no torch, no weights."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VAES = ("AutoencoderKL", "AutoencoderTiny")

PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "sit": {"transformer": ("SiTTransformer",), "vae": VAES},
    "sd3": {
        "transformer": ("SD3Transformer2DModel",),
        "vae": VAES,
        "scheduler": ("FlowMatchEulerDiscreteScheduler",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
    },
    "sdxl": {
        "unet": ("UNet2DConditionModel",),
        "vae": VAES,
        "scheduler": (),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    },
}
"""The parts of each family's folder, the network first, and the classes that each may hold; none stands for any."""

MAX_TOKENS = {"sd3": 128}
"""Length of the longest sequence of a text where nobody says it; a family that is not here has no choice."""

STATE_DICTS = (".safetensors", ".bin", ".pt", ".pth")
"""What a file with nothing but a network's state dict may end in."""


def network_part(family: str) -> str:
    """The folder that holds the network, in a model of this family."""
    return next(iter(PARTS[family]))


@dataclass(frozen=True)
class Description:
    """A model folder at a glance.

    Attributes:
        num_classes: number of class labels; None for a family that takes texts.
        layers: names of the network's linear and convolution layers.
    """

    num_classes: int | None
    layers: tuple[str, ...]


def describe(
    family: str, path: str | Path, own_vae: bool = False, own_text: bool = False, resolution: int | None = None
) -> Description | None:
    """Describe a local model folder; None for a hub name (`owner/name`, and no such folder here).

    Args:
        own_vae: the VAE comes from elsewhere, so the folder need not hold one.
        own_text: so do the texts' embeddings.
        resolution: that a text-to-image model is asked for; checked unless the VAE comes from elsewhere.

    Raises:
        FileNotFoundError: there is no such folder, or a part of it is missing.
        ValueError: it holds another model, or one that cannot draw at that resolution.
    """
    folder, network = Path(path), network_part(family)
    for part, expected in PARTS[family].items():
        elsewhere = own_text if part.startswith("text_encoder") else own_vae and part == "vae"
        if not elsewhere:
            check_part(path, part, expected)
    if not folder.is_dir():
        return None
    check_index(folder)
    try:
        config = _config(folder / network)
        if "scheduler" in PARTS[family]:
            check_noise(read_json(folder / "scheduler/scheduler_config.json"))
        if not own_vae and "num_classes" not in config:
            check_resolution(config, pixels_per_latent(_config(folder / "vae")), resolution)
        return Description(config.get("num_classes"), tuple(_layers(folder / network)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a config or a file of weights in {folder} is damaged: {error!r}") from error


def pixels_per_latent(vae: dict[str, Any]) -> int:
    """How many pixels the VAE with this config makes of one latent, along a side."""
    return 2 ** (len(vae.get("block_out_channels") or vae["decoder_block_out_channels"]) - 1)


def check_noise(scheduler: dict[str, Any]) -> None:
    """Refuse a scheduler's config whose network predicts something else than noise.

    Raises:
        ValueError: it does.
    """
    kind = scheduler.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ValueError(f"scheduler/scheduler_config.json has the prediction_type {kind}, only epsilon is known")


def check_resolution(network: dict[str, Any], factor: int, resolution: int | None) -> int:
    """The side of a text-to-image model's picture in pixels: `resolution`, or the one that it was trained for.

    Args:
        network: its config.
        factor: pixels per latent, along a side.

    Raises:
        ValueError: the VAE and the patches cannot hold it, or a position table is too small for it.
    """
    if resolution is None:
        return network["sample_size"] * factor
    step = factor * network.get("patch_size", 1)
    most = step * network.get("pos_embed_max_size", resolution)
    if not step <= resolution <= most and "pos_embed_max_size" in network:
        raise ValueError(f"resolution {resolution} is not in {step} to {most}, which the model's position table holds")
    if resolution < step or resolution % step:
        nearest = max(step, resolution // step * step)
        raise ValueError(f"resolution {resolution} is not a multiple of {step} (VAE times patch): give {nearest}")
    return resolution


def check_index(folder: Path) -> None:
    """Refuse a model_index.json that names classes of other libraries: the folder's own code would be run for them.

    Raises:
        ValueError: names the first such part.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        return
    try:
        named = {name: entry[0] for name, entry in read_json(path).items() if isinstance(entry, list)}
    except (ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is not a pipeline's config: {error}") from error
    for name, library in named.items():
        if library not in (None, "diffusers", "transformers"):
            raise ValueError(f"{path} asks for other code: {name} is of {library!r}, not diffusers or transformers")


def check_adapter(path: str | Path, found: Description | None) -> None:
    """Refuse what is no LoRA in PEFT's layout, or one for another network than `found` (None: not known).

    Raises:
        FileNotFoundError: no such folder, or a file is missing.
        ValueError: another kind of adapter, or it adapts a layer that the network does not have.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {path}")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}")
    try:
        config = read_json(folder / "adapter_config.json")
        kind = config.get("peft_type")
        names = list(_header(folder / "adapter_model.safetensors"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not an adapter: {error}") from error
    if kind != "LORA":
        raise ValueError(f"{path} holds a {kind} adapter, not a LORA")
    if config.get("megatron_config"):  # peft would import the module that the file names
        raise ValueError(f"{path} is an adapter for Megatron, which is not supported")
    adapted = [name.removeprefix("base_model.model.").split(".lora_A.")[0] for name in names if ".lora_A." in name]
    if not adapted:
        raise ValueError(f"{path} adapts no layer")
    known = adapted if found is None else found.layers
    for layer in adapted:
        if layer not in known:
            raise ValueError(f"{path} adapts {layer}, which the network does not have")


def text_fingerprint(family: str, path: str | Path, max_tokens: int | None) -> str:
    """Names the text encoders of a model folder and the length of their sequence: equal texts give equal embeddings.

    It is a digest of all configs, all files of the tokenizers, and of the weights' headers, sizes and a sample of
    their bytes. A hub name stands for itself.

    Raises:
        FileNotFoundError: an encoder is missing.
        ValueError: one is of another class.
    """
    digest = hashlib.sha256(f"{max_tokens}".encode())
    for part, expected in PARTS[family].items():
        if part.startswith("text_encoder"):
            check_part(path, part, expected)
            for folder in (Path(path) / part, Path(path) / part.replace("text_encoder", "tokenizer")):
                for file in sorted(file for file in folder.glob("[!.]*") if file.is_file()):
                    digest.update(file.name.encode())
                    digest.update(_sample(file))
    if not Path(path).is_dir():
        digest.update(str(path).encode())
    return digest.hexdigest()


def network_fingerprint(family: str, path: str | Path) -> str:
    """Names the network of a model folder, by its config and by sizes and a sample of the bytes of its weights.

    A hub name stands for itself.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is of another class.
    """
    part, expected = next(iter(PARTS[family].items()))
    check_part(path, part, expected)
    digest = hashlib.sha256()
    for file in sorted((Path(path) / part).glob("[!.]*")):
        digest.update(file.name.encode())
        digest.update(_sample(file))
    if not Path(path).is_dir():
        digest.update(str(path).encode())
    return digest.hexdigest()


def content_fingerprint(path: str | Path) -> str:
    """Names what a file holds, or a folder's files that are not hidden, by names, sizes and a sample of the bytes.

    What is not there stands for itself, such as a hub name.
    """
    place, digest = Path(path), hashlib.sha256()
    if place.is_file():
        digest.update(_sample(place))
    elif place.is_dir():
        names = {str(file.relative_to(place)): file for file in place.rglob("[!.]*") if file.is_file()}
        for name in sorted(name for name in names if "/." not in f"/{name}"):
            digest.update(name.encode(errors="surrogateescape"))
            digest.update(_sample(names[name]))
    else:
        digest.update(str(path).encode())
    return digest.hexdigest()


def _sample(file: Path, pieces: int = 64, length: int = 1 << 16) -> bytes:
    """A small file's bytes; of a large one its size and evenly spread pieces, the header's first."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= pieces * length:
            return stream.read()
        found = [str(size).encode()]
        for i in range(pieces):
            stream.seek(i * (size - length) // (pieces - 1))
            found.append(stream.read(length))
        return b"".join(found)


def check_part(path: str | Path, part: str, expected: Sequence[str]) -> None:
    """Refuse a local folder whose `part` ("" for itself) is missing, another model, or pickled; a hub name passes.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks the part.
        ValueError: the part is of none of the classes `expected`, where there are some; or its weights are no
            safetensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
            raise FileNotFoundError(f"no model folder {path}")
        return
    config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not config.is_file():
        raise FileNotFoundError(f"{path} holds no {config.relative_to(folder)}")
    try:
        read = read_json(config)
        found = read.get("_class_name") or (read.get("architectures") or [None])[0]  # diffusers' and transformers'
    except (ValueError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{config} is not a model's config: {error}") from error
    check_class(folder / part, found, expected)
    _refuse_pickles(folder / part)


def _refuse_pickles(folder: Path) -> None:
    """Raise ValueError where a folder's weights are pickles, or an index leads elsewhere; with none there, nothing."""
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in (*STATE_DICTS[1:], ".ckpt"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle; only safetensors are read: open it with the library that wrote it "
            "and save it with save_pretrained(…, safe_serialization=True)"
        )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(read_json(index)["weight_map"].values())
            strange = [name for name in shards if Path(name).name != name or Path(name).suffix != ".safetensors"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not an index of weights: {error!r}") from error
        if strange:
            raise ValueError(f"{index} names {strange[0]!r}, which is no .safetensors file beside it")


def check_class(where: str | Path, found: str | None, expected: Sequence[str]) -> None:
    """Refuse a part of a class that is none of those `expected`, where there are some."""
    if expected and found not in expected:
        raise ValueError(f"{where} holds a {found}, not a {' or '.join(expected)}")


def check_weights(family: str, path: str | Path, found: Description | None = None) -> None:
    """Refuse what is neither a folder with a network of this family nor the file of a state dict.

    Args:
        found: the model that it is to stand in for; a .safetensors file must then name the same layers.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder holds no network.
        ValueError: it is something else.
    """
    path, part = Path(path), network_part(family)
    if path.is_dir():
        check_part(path, part if (path / part).is_dir() else "", PARTS[family][part])
        return
    if not path.exists():
        raise FileNotFoundError(f"no model folder {path}, nor such a file")
    if path.suffix not in STATE_DICTS:
        raise ValueError(f"{path} is no state dict: give a file that ends in {', '.join(STATE_DICTS)}")
    if path.suffix == ".safetensors":
        try:
            layers = set(_layers_in(path))
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is no safetensors file") from error
        if found is not None and found.layers:
            check_names(path, layers, found.layers)


def check_names(where: str | Path, found: Collection[str], expected: Collection[str]) -> None:
    """Refuse names that are not exactly those expected; the first that is missing or unknown is named.

    Raises:
        ValueError: they differ.
    """
    for fault, names in (
        ("lacks", [name for name in expected if name not in found]),
        ("holds the unknown", [name for name in found if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{where} {fault} {names[0]}{more}")


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"the brackets of {file} are nested too deeply") from None


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


def _layers(folder: Path) -> list[str]:
    return [name for file in sorted(folder.glob("*.safetensors")) for name in _layers_in(file)]


def _layers_in(file: Path) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name, entry in _header(file).items()
        if name.endswith(".weight") and len(entry["shape"]) > 1 and "embed.weight" not in name
    ]


def _header(file: Path) -> dict[str, Any]:
    """The names of a safetensors file with their shapes."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 2 <= size <= file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header
