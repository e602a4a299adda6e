"""Reading a LoRA of others: PEFT's folder, or a file in diffusers' or kohya's layout.

diffusers converts what it can. kohya's layout of SD3, which it cannot convert, is read by the family.

Every tensor of the file must find its place; otherwise the LoRA is refused with the name of the first that does not.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from dmdr_models.base.reasons import reason
from dmdr_models.folder.adapter_files import (
    KOHYA_PREFIX,
    PEFT_PREFIX,
    AdapterFiles,
    check_no_text_encoders,
    diffusers_config,
    find_adapter,
)  # fmt: skip
from dmdr_models.folder.layout import Layout
from dmdr_models.folder.state_dicts import load_state_dict

A, B = ".lora_A.weight", ".lora_B.weight"


class Change(NamedTuple):
    """The change of one layer's weights, scale · B·A.

    Attributes:
        a: `[r, in]`, or `[r, in, kh, kw]` of a convolution; float32.
        b: `[out, r]`, or `[out, r, 1, 1]`; float32.
        scale: alpha / r.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoRA:
    """A LoRA that was read from `source`: the change of each layer, by the layer's name in diffusers' network."""

    source: str
    changes: dict[str, Change]

    def check(self, network: nn.Module) -> None:
        """Check that a network has all layers, in the right shape.

        Raises:
            ValueError: names the first that it has not.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        for name, (a, b, _) in self.changes.items():
            shape = shapes.get(f"{name}.weight")
            if shape is None:
                raise ValueError(f"{self.source} adapts {name}, which the network does not have")
            changed = (b.shape[0], *a.shape[1:]) if b.ndim and a.ndim else ()
            if changed != shape or b.shape[1:2] != a.shape[:1]:
                raise ValueError(f"{self.source} adapts {name} with shape {changed}, the network's has {shape}")


def read_lora(path: str | Path, layout: Layout, pipeline: Any = None, config: Mapping[str, Any] | None = None) -> LoRA:
    """Read a LoRA of a network.

    Args:
        path: as for `dmdr_models.folder.adapter_files.find_adapter`.
        layout: of the network's family.
        pipeline: the class in diffusers whose converters know the other layouts; None reads PEFT's alone.
        config: of the network, by which kohya's names of blocks are converted.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is no LoRA, or one with a tensor that has no place in the network.
    """
    files, part = find_adapter(path), layout.network_part
    raw = load_state_dict(files.weights)
    check_no_text_encoders(path, raw)
    for name, tensor in raw.items():
        if tensor.numel() != 1 if name.endswith(".alpha") else tensor.ndim < 2 or not tensor.numel():
            kind = "single number" if name.endswith(".alpha") else "matrix"
            raise ValueError(f"{path} has {name} of shape {tuple(tensor.shape)}, which is no {kind}")
    if layout.reads_kohya is not None and any(name.startswith(KOHYA_PREFIX) for name in raw):
        changes, used = _kohyas(files, raw, resolve_name(layout.reads_kohya), config or {})
    else:
        changes, used = _pefts(files, raw, part, pipeline, config or {})
    for name in raw:
        if name not in used:
            raise ValueError(f"{path} holds {name}, which has no place in the {part}: give a LoRA of the {part} alone")
    if not changes:
        raise ValueError(f"{path} adapts no layer")
    for layer, (a, b, scale) in changes.items():
        if not (isfinite(scale) and a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{path} adapts {layer} with numbers that are not finite: give another LoRA")
    return LoRA(str(path), changes)


def _kohyas(
    files: AdapterFiles, raw: Mapping[str, Tensor], reads: Any, config: Mapping[str, Any]
) -> tuple[dict[str, Change], set[str]]:
    """Read a file in kohya's layout with the family's own reader: the changes, and the names of tensors used."""
    try:
        found = reads(raw, config)
    except ValueError as error:
        raise ValueError(f"{files.weights}: {error}") from error
    changes = {}
    for layer, (a, b, name) in found.items():
        rank = len(raw[f"{name}.lora_down.weight"])
        changes[layer] = Change(a.float(), b.float(), float(raw.get(f"{name}.alpha", rank)) / rank)
    names = {name for _, _, name in found.values()}
    return changes, {f"{name}.{end}" for name in names for end in ("lora_down.weight", "lora_up.weight", "alpha")}


def _pefts(
    files: AdapterFiles, raw: Mapping[str, Tensor], part: str, pipeline: Any, config: Mapping[str, Any]
) -> tuple[dict[str, Change], set[str]]:
    """Read a file in PEFT's layout, or in one that diffusers converts: the changes, and the names of tensors used."""
    if files.config is not None:
        state, settings = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in raw.items()}, files.config
    elif pipeline is None:
        raise ValueError(f"{files.weights} is not in PEFT's layout, the only one that is read for this family")
    else:
        state, settings = _converted(files, raw, part, pipeline, config), diffusers_config(files, part)
    names = {id(tensor): name for name, tensor in raw.items()}
    changes, used = {}, set()
    for name, a in state.items():
        layer = name.removesuffix(A)
        b = state.get(layer + B)
        if not name.endswith(A) or b is None:
            continue
        alpha = names[id(a)].rpartition(".lora_down")[0] + ".alpha"
        used |= {names[id(a)], names[id(b)], alpha}
        scale = raw[alpha].item() / len(a) if alpha in raw else _scale(files.weights, settings, layer, len(a))
        changes[layer] = Change(a.float(), b.float(), scale)
    return changes, used


def _converted(
    files: AdapterFiles, raw: Mapping[str, Tensor], part: str, pipeline: Any, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of the network by PEFT's names, as far as diffusers knows them."""
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    try:
        found = pipeline.lora_state_dict(dict(raw), unet_config=SimpleNamespace(**config))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{files.weights} is in a layout that diffusers cannot convert: {reason(error)}") from error
    state = found[0] if isinstance(found, tuple) else found
    own = {name.removeprefix(f"{part}."): tensor for name, tensor in state.items() if name.startswith(f"{part}.")}
    return own if any(name.endswith(A) for name in own) else convert_unet_state_dict_to_peft(own)


def _scale(source: Path, settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / r of a layer as PEFT's config says it; 1 without a config.

    Raises:
        ValueError: what the config says is no number.
    """
    from peft.utils.other import get_pattern_key

    try:
        patterns = dict(settings.get("alpha_pattern") or {})
        alpha = float(patterns.get(get_pattern_key(list(patterns), layer), settings.get("lora_alpha", rank)))
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(f"{source} has a lora_alpha or an alpha_pattern that cannot be read: {error}") from None
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)
