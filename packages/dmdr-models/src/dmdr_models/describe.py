"""What a model folder holds, read from its configs and file headers alone: no torch, no weights."""

import json
from dataclasses import dataclass
from pathlib import Path

PARTS = {"sit": {"transformer": "SiTTransformer", "vae": "AutoencoderKL"}}
"""The parts of each family's folder and the class that each must hold."""


@dataclass(frozen=True)
class Description:
    """A model folder at a glance.

    Attributes:
        num_classes: number of class labels.
        layers: names of the network's linear and convolution layers.
    """

    num_classes: int
    layers: tuple[str, ...]


def describe(family: str, path: str | Path, own_vae: bool = False) -> Description | None:
    """Describe a local model folder; None for a hub name (`owner/name`, and no such folder here).

    Args:
        own_vae: the VAE comes from elsewhere, so the folder need not hold one.

    Raises:
        FileNotFoundError: there is no such folder, or a part of it is missing.
        ValueError: it holds another model.
    """
    folder = Path(path)
    for part, expected in PARTS[family].items():
        if part == "vae" and own_vae:
            continue
        check_part(path, part, expected)
    if not folder.is_dir():
        return None
    config = json.loads((folder / "transformer/config.json").read_text(encoding="utf-8"))
    return Description(config["num_classes"], tuple(_layers(folder / "transformer")))


def check_part(path: str | Path, part: str, expected: str) -> None:
    """Refuse a local folder whose `part` ("" for itself) is missing or another model; a hub name passes.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks the part.
        ValueError: the part is not of the class `expected`.
    """
    folder = Path(path)
    if not folder.is_dir():
        if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") != 1:
            raise FileNotFoundError(f"no model folder {path}")
        return
    config = folder / part / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{path} holds no {Path(part) / 'config.json'}")
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is not a model's config: {error}") from error
    if found != expected:
        raise ValueError(f"{folder / part} holds a {found}, not a {expected}")


def _layers(folder: Path) -> list[str]:
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        names += [
            name.removesuffix(".weight")
            for name, entry in header.items()
            if name.endswith(".weight") and len(entry["shape"]) > 1 and "embed.weight" not in name
        ]
    return names
