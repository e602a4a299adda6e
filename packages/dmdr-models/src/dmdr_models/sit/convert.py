"""Published SiT checkpoints to a model folder.

Two layouts are read; both name their layers alike.

- "repa" (github.com/sihyun-yu/REPA): t = 1 is noise and the network predicts noise - data, as ours does. The
  `projectors.*` serve only the training and are dropped.
- "sit" (github.com/willisma/SiT): t = 0 is noise and the network predicts data - noise. It may put out 2·C channels,
  of which the last C (a variance that flow matching does not train) are dropped. Time and sign are folded into the
  weights, exactly: v_ours(x, t, y) = -v_theirs(x, 1 - t, y).

The tensors' shapes tell everything except the number of heads, which follows from the published sizes (or the query
norm), and the number of classes, which is one less than the rows of the label table.

    weights, options = read_checkpoint("SiT-XL-2-256.pt")
    config, weights = convert(weights, options=options)
    save(config, weights, "sit-xl", vae="sd-vae-ft-ema")
"""

import argparse
import math
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dmdr_models.base.errors import ConversionError
from dmdr_models.base.json_files import read_json
from dmdr_models.base.reasons import reason
from dmdr_models.sit.transformer import SIZES, SiTTransformer, sincos_positions, time_frequencies

SOURCES = ("repa", "sit")

POSITION_TOLERANCE = 1e-2
"""How far a stored position embedding may be from ours. Averaging weights over a long training (EMA) moves the fixed
values by up to a few 1e-4; another layout of the embedding differs by more than 1."""

# Their name of a layer, by ours. Queries, keys and values share one layer there.
_LAYERS = {
    "patch_embed": "x_embedder.proj",
    "time_embed.0": "t_embedder.mlp.0",
    "time_embed.2": "t_embedder.mlp.2",
    "label_embed": "y_embedder.embedding_table",
    "modulation_out": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "attn.to_q": "attn.qkv",
    "attn.to_k": "attn.qkv",
    "attn.to_v": "attn.qkv",
    "attn.to_out": "attn.proj",
    "attn.norm_q": "attn.q_norm",
    "attn.norm_k": "attn.k_norm",
    "modulation": "adaLN_modulation.1",
}
_QKV = ("to_q", "to_k", "to_v")
_ANCHORS = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight", "pos_embed")


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights in a checkpoint ("ema", else "model", else the file itself), and its training options.

    Nothing in the file is executed: torch's restricted reader reads pickles, and accepts tensors and
    `argparse.Namespace`, in which both trainers store their options. Tensors are mapped, not read.

    Raises:
        FileNotFoundError: no such file.
        ConversionError: the file holds anything but weights and options, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path), {}
        with torch.serialization.safe_globals([argparse.Namespace]):
            mapped = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} is refused: it holds objects other than weights, which could run code when loaded, or is no "
            "checkpoint; save only its state dict, best as .safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ConversionError(f"{path} is damaged or no checkpoint: {reason(error)}") from error
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a state dict")
    options = content.get("args")
    weights = content.get("ema", content.get("model", content))
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConversionError(f"{path} holds neither 'ema' nor 'model' nor a bare state dict of tensors")
    return dict(weights), vars(options) if isinstance(options, argparse.Namespace) else {}


def convert(
    weights: Mapping[str, Tensor],
    source: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published state dict to the config and state dict of a `SiTTransformer`, float32.

    Args:
        weights: the state dict; tensors on the meta device work, their values are then not checked.
        source: "repa" or "sit"; default: recognised by the keys where these leave no doubt.
        num_heads: of a network that is not one of the published sizes and has no query norm.
        num_classes: without the null class, where the label table is not one row longer than ImageNet's classes.
        options: the options of its training, as `read_checkpoint` returns them.

    Raises:
        ConversionError: the source or the number of heads is not certain; keys are missing, unexpected or of a wrong
            shape; the label table has no null row; the positions are not ours; the network was not trained for linear
            flow matching with velocity prediction.
    """
    options = options or {}
    _check_options(options)
    state = _without_legacy_names(weights)
    source = source or detect_source(state)
    if source not in SOURCES:
        raise ConversionError(f"unknown source {source!r}; valid are {', '.join(SOURCES)}")
    if source == "repa":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("projectors.")}
    config = _config(state, num_heads, num_classes or options.get("num_classes"))
    outputs = _check_shapes(state, config, source)
    _check_positions(state["pos_embed"], config)
    ours = _rename(state, config, outputs)
    return config, _reverse_time(ours) if source == "sit" else ours


def detect_source(state: Mapping[str, Tensor]) -> str:
    """ "repa" or "sit", where the keys and shapes allow one of them only.

    Only REPA has projectors and query norms; only the original may have twice as many output as input channels.

    Raises:
        ConversionError: both are possible.
    """
    if any(name.startswith("projectors.") or ".attn.q_norm." in name for name in state):
        return "repa"
    patch, linear = state.get("x_embedder.proj.weight"), state.get("final_layer.linear.weight")
    if patch is not None and linear is not None and len(linear) == 2 * patch[0].numel():
        return "sit"
    raise ConversionError(
        "the weights do not tell whether they are REPA's or the original SiT's, whose time runs the other way; "
        "give --source repa or --source sit"
    )


def save(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: str | Path, vae: str | Path | None = None
) -> None:
    """Write `transformer/`, and a copy of the folder `vae` as `vae/`, to a new folder: all of it or nothing.

    Raises:
        ConversionError: `folder` is there already, or `vae` is no AutoencoderKL for these latents.
        OSError: `folder` cannot be written.
    """
    folder = Path(folder)
    check_target(folder)
    vae_files = [] if vae is None else _vae_files(Path(vae), config["in_channels"])
    with torch.device("meta"):
        network = SiTTransformer(**config)
    network.load_state_dict(dict(weights), assign=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        network.save_pretrained(partial / "transformer")
        for file in vae_files:
            (partial / "vae").mkdir(exist_ok=True)
            shutil.copyfile(file, partial / "vae" / file.name)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Raise a ConversionError unless `folder` is new, or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder} is there already; give a new folder or remove it")


def _check_options(options: Mapping[str, Any]) -> None:
    """Both trainers can train other paths and predictions; those networks are of no use here."""
    for name, valid in (("path_type", ("linear",)), ("prediction", ("v", "velocity"))):
        if name in options and str(options[name]).lower() not in valid:
            raise ConversionError(
                f"the network was trained with {name} {options[name]!r}; only {' or '.join(valid)} can be converted"
            )


def _without_legacy_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """REPA's early checkpoints name the blocks after the aligned one `decoder_blocks`, counted from 0 again."""
    first = len(_block_indices(weights))
    return {
        re.sub(r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{first + int(match[1])}.", name): tensor
        for name, tensor in weights.items()
    }


def _block_indices(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in names) if match}


def _config(state: Mapping[str, Tensor], num_heads: int | None, num_classes: int | None) -> dict[str, Any]:
    missing = [name for name in _ANCHORS if name not in state]
    if missing:
        raise ConversionError(f"this is no SiT checkpoint: it has no {_listed(missing)}")
    patches, table, hidden, positions = (state[name] for name in _ANCHORS)
    if (patches.ndim, table.ndim, hidden.ndim, positions.ndim) != (4, 2, 2, 3):
        raise ConversionError(f"this is no SiT checkpoint: wrong shapes of {_listed(_ANCHORS)}")
    width, in_channels, patch_size, _ = patches.shape
    grid = math.isqrt(positions.shape[1])
    if grid**2 != positions.shape[1]:
        raise ConversionError(f"pos_embed has {positions.shape[1]} positions, which is not a square picture")
    depth = max(_block_indices(state)) + 1
    query_norm = state.get("blocks.0.attn.q_norm.weight")
    return {
        "sample_size": grid * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "width": width,
        "depth": depth,
        "num_heads": _num_heads(width, depth, query_norm, num_heads),
        "mlp_ratio": len(hidden) / width,
        "num_classes": _num_classes(len(table), num_classes),
        "qk_norm": query_norm is not None,
    }


def _num_heads(width: int, depth: int, query_norm: Tensor | None, given: int | None) -> int:
    published = [s["num_heads"] for s in SIZES.values() if (s["width"], s["depth"]) == (width, depth)]
    found = width // len(query_norm) if query_norm is not None else published[0] if published else given
    if found is None:
        raise ConversionError(
            f"width {width} and depth {depth} are no published size, so the number of heads is not known; "
            "give --num-heads"
        )
    if given not in (None, found):
        raise ConversionError(f"--num-heads {given} contradicts the weights, which have {found} heads; leave it out")
    if width % found or width % 4:
        raise ConversionError(f"width {width} is not a multiple of 4 and of {found} heads; give another --num-heads")
    return found


def _num_classes(rows: int, given: int | None) -> int:
    # ImageNet's 1000 are the only number of classes that a table without a null row gives away by itself.
    if rows == (given or 1000):
        raise ConversionError(
            f"the label table has {rows} rows for {rows} classes: without the null row there is no unconditional "
            "prediction; take a checkpoint trained with label dropout (class_dropout_prob > 0)"
            + ("" if given else f", or give --num-classes {rows - 1} if its last row is the null class")
        )
    if given and rows != given + 1:
        raise ConversionError(
            f"the label table has {rows} rows, not the {given + 1} of {given} classes and the null class; "
            f"give --num-classes {rows - 1}"
        )
    return rows - 1


def _check_shapes(state: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> int:
    """Compare all names and shapes with those that the config asks for; return the number of output channels."""
    channels = config["in_channels"]
    linear = state.get("final_layer.linear.weight")
    doubled = source == "sit" and linear is not None and len(linear) == 2 * config["patch_size"] ** 2 * channels
    outputs = 2 * channels if doubled else channels
    expected: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (config["sample_size"] // config["patch_size"]) ** 2, config["width"])
    }
    for name, shape in _our_shapes(config).items():
        factor = 3 if name.split(".")[-2] in _QKV else 2 if doubled and name.startswith("proj_out.") else 1
        expected[_their_name(name)] = (factor * shape[0], *shape[1:])
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    if any(faults.values()):
        told = "; ".join(f"{fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise ConversionError(f"the weights do not fit a SiT of the source {source!r}; {told}")
    return outputs


def _our_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in SiTTransformer(**config).state_dict().items()}


def _their_name(name: str) -> str:
    layer, kind = name.rsplit(".", 1)
    block = re.match(r"blocks\.\d+\.", layer)
    prefix = block[0] if block else ""
    inner = layer.removeprefix(prefix)
    return f"{prefix}{_LAYERS.get(inner, inner)}.{kind}"


def _check_positions(stored: Tensor, config: Mapping[str, Any]) -> None:
    if stored.is_meta:
        return
    ours = sincos_positions(config["width"], config["sample_size"] // config["patch_size"])
    distance = (stored[0].float() - ours).abs().max().item()
    if not distance <= POSITION_TOLERANCE:
        raise ConversionError(
            f"pos_embed differs from the fixed sin-cos embedding by up to {distance:.3g}; only networks with that "
            "embedding can be converted"
        )


def _rename(state: Mapping[str, Tensor], config: Mapping[str, Any], outputs: int) -> dict[str, Tensor]:
    ours = {}
    for name in _our_shapes(config):
        tensor = state[_their_name(name)]
        part = name.split(".")[-2]
        if part in _QKV:
            tensor = tensor.chunk(3)[_QKV.index(part)]
        elif part == "proj_out":
            # Rows run over (row in the patch, column in the patch, channel): the first channels of every pixel.
            tensor = tensor.unflatten(0, (-1, outputs))[:, : config["in_channels"]].flatten(0, 1)
        # A copy of its own: parts of one tensor cannot be stored as safetensors.
        ours[name] = tensor.to(torch.float32, copy=True).contiguous()
    return ours


def _reverse_time(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of -v(x, 1 - t, y) from those of v(x, t, y).

    With c = cos f and s = sin f, the time features at 1 - t are a rotation of those at t:
    cos((1-t)f) = c·cos(tf) + s·sin(tf) and sin((1-t)f) = s·cos(tf) - c·sin(tf).
    """
    first = weights["time_embed.0.weight"].double()
    on_cos, on_sin = first.chunk(2, dim=1)
    frequencies = time_frequencies(first.shape[1]).double().to(first.device)
    c, s = frequencies.cos(), frequencies.sin()
    rotated = torch.cat([on_cos * c + on_sin * s, on_cos * s - on_sin * c], dim=1)
    return {
        **weights,
        "time_embed.0.weight": rotated.float(),
        "proj_out.weight": -weights["proj_out.weight"],
        "proj_out.bias": -weights["proj_out.bias"],
    }


def _vae_files(folder: Path, channels: int) -> list[Path]:
    config = folder / "config.json"
    if not config.is_file():
        raise ConversionError(f"--vae {folder} holds no config.json; give the folder of an AutoencoderKL")
    try:
        content = read_json(config)
    except ValueError as error:
        raise ConversionError(
            f"--vae: {config} is not a model's config: {error}; give the folder of an AutoencoderKL"
        ) from error
    if content.get("_class_name") != "AutoencoderKL" or content.get("latent_channels", 4) != channels:
        raise ConversionError(
            f"--vae {folder} holds a {content.get('_class_name')} with {content.get('latent_channels', 4)} latent "
            f"channels; give an AutoencoderKL with {channels}"
        )
    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors*"))
    if not files:
        raise ConversionError(f"--vae {folder} holds no diffusion_pytorch_model.safetensors; give a folder that does")
    return [config, *files]


def _listed(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
