"""What a model folder holds, read from its configs and the headers of its weights. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmdr_models.base.json_files import read_json
from dmdr_models.base.reasons import reason
from dmdr_models.folder.checks import check_index, check_part, check_size, check_tokenizer, single_file
from dmdr_models.folder.layout import VAES, Layout
from dmdr_models.folder.quantisation import method_of
from dmdr_models.folder.safetensors_header import layers_in
from dmdr_models.folder.weight_files import weight_files


@dataclass(frozen=True)
class Description:
    """A model folder at a glance.

    Attributes:
        num_classes: number of class labels, as the network's config says; None for a family that takes texts.
        layers: names of the network's linear and convolution layers.
        quantised: the library that quantised the network's weights; None for plain weights.
    """

    num_classes: int | None
    layers: tuple[str, ...]
    quantised: str | None = None


def describe(
    layout: Layout,
    path: str | Path,
    own_vae: bool = False,
    own_text: bool = False,
    sizes: Sequence[tuple[int, int]] = (),
    quantised: bool = False,
) -> Description | None:
    """Describe a local model folder; None for a hub name (`owner/name`, and no such folder here).

    Args:
        own_vae: the VAE comes from elsewhere, so that the folder need not hold one.
        own_text: the embeddings of the texts come from elsewhere, so that the folder need not hold text encoders.
        sizes: (height, width) in pixels of the pictures that the model is to draw; empty: its own size. They are not
            checked if the VAE comes from elsewhere.
        quantised: accept a network with quantised weights, if the library that reads them is installed.

    Raises:
        FileNotFoundError: the folder or a part of it is missing.
        SizeError: the model cannot draw such a size.
        ValueError: it holds another model.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(single_file(folder))
    lacking = layout.lacking(path)
    for part, expected in layout.parts.items():
        elsewhere = own_text if part in layout.text_encoders else own_vae and part == "vae"
        if elsewhere or part in lacking:
            continue
        if part in layout.optional and folder.is_dir() and not (folder / part).is_dir():
            fix = f'download it, or for a model without it set "{part}" to [null, null] in its model_index.json'
            raise FileNotFoundError(f"{path} holds no {part}: {fix}")
        check_part(path, part, expected, quantised and part == layout.network_part)
        if part in layout.text_encoders and folder.is_dir():
            check_tokenizer(folder, part)
    if not folder.is_dir():
        return None
    check_index(folder)
    try:
        network = _config(folder, layout.network_part)
        for part in layout.checks:
            if part != "vae" or not own_vae:
                layout.check_config(part, _config(folder, part))
        if not own_vae and (sizes or layout.takes == "texts"):
            factor = pixels_per_latent(_config(folder, "vae")) if "vae" in layout.parts else 1
            for height, width in sizes or [(network["sample_size"] * factor,) * 2]:
                check_size(layout, network, factor, height, width)
        files = weight_files(folder / layout.network_part).tensors
        layers = [name for file in files for name in layers_in(file)]
        classes = network["num_classes"] if layout.takes == "labels" else None
        return Description(classes, tuple(layers), method_of(network))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a config or a file of weights in {folder} is damaged: {reason(error)}") from error


def check_vae(layout: Layout, path: str | Path) -> None:
    """Check another VAE for a family: a local folder, or a hub name, which passes.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no model.
        ValueError: it holds something else, or a VAE that the family cannot use.
    """
    check_part(path, "", VAES)
    if Path(path).is_dir():
        layout.check_config("vae", _config(Path(path), ""))


def pixels_per_latent(vae: dict[str, Any]) -> int:
    """How many pixels the VAE with this config makes of one latent, along a side."""
    return 2 ** (len(vae.get("block_out_channels") or vae["decoder_block_out_channels"]) - 1)


def _config(folder: Path, part: str) -> dict[str, Any]:
    return read_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))
