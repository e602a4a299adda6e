"""The layout in which a model's authors published it, which ComfyUI, kohya's sd-scripts and their like read.

diffusers gave layers other names, and split some: where the authors' attention has one layer for query, key and value,
diffusers has three. A family tells by a function where each layer of diffusers lies in the original network.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NETWORK = "model.diffusion_model."
"""What the names of the network's weights begin with in an original checkpoint."""
LORA = "lora_unet_"
"""What the names of its layers begin with in a LoRA of kohya's layout, whatever the network."""


class Place(NamedTuple):
    """Where a layer of diffusers' network lies in the original one.

    Attributes:
        layer: the name of the original layer; "" for a parameter of the network itself.
        part, parts: the original layer's outputs are so many equal parts, and this is one of them.
        swapped: the two halves of the outputs have changed places.
    """

    layer: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


Places = Callable[[str], Place]
"""The place of a layer, by its name in diffusers' network."""


def original_state(state: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """A network's state dict by its original names, with `NETWORK` before each.

    Args:
        state: of diffusers' network.
    """
    parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in state.items():
        layer, _, weight = name.rpartition(".")
        place = places(layer)
        parts[f"{place.layer}.{weight}".lstrip(".")][place.part] = _in_order(tensor, place)
    return {NETWORK + name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}


def kohya_lora(adapter: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """A LoRA in kohya's layout: `lora_down` is A, `lora_up` is B and `alpha` the rank, by the original layers' names.

    Of a layer that diffusers split, the adapters become one of the sum of their ranks: their A stacked, and their B as
    blocks. Rows of outputs that no adapter reaches are zeros.

    Args:
        adapter: as `LoRANetwork.adapter_state` gives it, with alpha / rank folded into B.
    """
    layers: dict[str, list[tuple[Place, Tensor, Tensor]]] = defaultdict(list)
    for name, a in adapter.items():
        layer, marker, _ = name.rpartition(".lora_A.")
        if marker:
            place, b = places(layer), adapter[f"{layer}.lora_B.weight"]
            layers[LORA + place.layer.replace(".", "_")].append((place, a, _in_order(b, place)))
    state: dict[str, Tensor] = {}
    for name, found in layers.items():
        down, up = torch.cat([a for _, a, _ in found]), _blocks([(place, b) for place, _, b in found])
        alpha = torch.tensor(float(len(down)))
        state |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    return state


def diffusers_lora(
    state: Mapping[str, Tensor], layers: Iterable[str], places: Places
) -> dict[str, tuple[Tensor, Tensor, str]]:
    """The inverse of `kohya_lora`: A and B of each of diffusers' layers, and kohya's name of the layer they come from.

    Where diffusers split a layer, all parts get its A, and each the rows of B that are its own. Columns of B that have
    only zeros in these rows are left out, with their rows of A: the others are the part's own adapter, if the file is
    one that `kohya_lora` or sd-scripts' `split_qkv` made of an adapter for each part. If all of B is zeros, all stays.

    Args:
        state: a LoRA in kohya's layout; tensors that belong to no layer are ignored.
        layers: the names of layers of diffusers' network.

    Raises:
        ValueError: A and B of a layer have different ranks.
    """
    found = {}
    for layer in layers:
        place = places(layer)
        name = LORA + place.layer.replace(".", "_")
        down, up = state.get(f"{name}.lora_down.weight"), state.get(f"{name}.lora_up.weight")
        if down is None or up is None:
            continue
        if min(down.ndim, up.ndim) < 2 or up.shape[1:].numel() != len(down) or len(up) % place.parts:
            raise ValueError(f"{name} has lora_down of shape {tuple(down.shape)} and lora_up of {tuple(up.shape)}")
        a, b = down, _in_order(up, place)
        if place.parts > 1:
            b = up.chunk(place.parts)[place.part]
            used = b.flatten(1).any(0) | ~up.any()
            a, b = a[used], b[:, used]
        if len(a):
            found[layer] = a, b, name
    return found


def _in_order(tensor: Tensor, place: Place) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1]) if place.swapped else tensor


def _blocks(found: list[tuple[Place, Tensor]]) -> Tensor:
    """Matrices `[rows, rank]` of the parts of one layer as `[parts · rows, sum of ranks]`."""
    place, first = found[0]
    rows = len(first)
    up = first.new_zeros(place.parts * rows, sum(b.shape[1] for _, b in found), *first.shape[2:])
    column = 0
    for place, b in found:
        up[place.part * rows : (place.part + 1) * rows, column : column + b.shape[1]] = b
        column += b.shape[1]
    return up
