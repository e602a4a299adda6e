"""Where the layers of diffusers' UNet lie in SDXL's original UNet, which numbers its blocks from end to end."""

import re
from collections.abc import Mapping
from typing import Any

from dmdr_models.families.original_layout import Place

OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""The layers outside of the blocks."""
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""The layers of a residual block."""
MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def place(config: Mapping[str, Any], name: str) -> Place:
    """The place of a layer of the UNet with this config.

    An original block holds a residual block and the attention after it; a sampler has a block of its own on the way
    down, and ends the last block of its level on the way up.
    """
    if name in OUTSIDE:
        return Place(OUTSIDE[name])
    if name.startswith("mid_block."):
        _, kind, at, layer = name.split(".", 3)
        return Place(f"middle_block.{MIDDLE[f'{kind}.{at}']}.{_inner(kind, layer)}")
    found = BLOCK.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} has no place in SDXL's original UNet")
    way, level, kind, number, layer = found[1], int(found[2]), found[3], int(found[4]), found[5]
    first, last = level * (config["layers_per_block"] + 1), config["layers_per_block"]
    if kind == "downsamplers":
        return Place(f"input_blocks.{1 + first + last}.0.op")
    if kind == "upsamplers":
        behind = 2 if config["up_block_types"][level].startswith("CrossAttn") else 1
        return Place(f"output_blocks.{first + last}.{behind}.conv")
    block = f"input_blocks.{1 + first + number}" if way == "down" else f"output_blocks.{first + number}"
    return Place(f"{block}.{int(kind == 'attentions')}.{_inner(kind, layer)}")


def _inner(kind: str, layer: str) -> str:
    return RESNET[layer] if kind == "resnets" else layer
