"""Where the layers of diffusers' SD3Transformer2DModel lie in the original MMDiT."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from dmdr_models.families.original_layout import Place, diffusers_lora

OUTSIDE = {
    "pos_embed": Place(""),
    "pos_embed.proj": Place("x_embedder.proj"),
    "context_embedder": Place("context_embedder"),
    "time_text_embed.timestep_embedder.linear_1": Place("t_embedder.mlp.0"),
    "time_text_embed.timestep_embedder.linear_2": Place("t_embedder.mlp.2"),
    "time_text_embed.text_embedder.linear_1": Place("y_embedder.mlp.0"),
    "time_text_embed.text_embedder.linear_2": Place("y_embedder.mlp.2"),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", swapped=True),
    "proj_out": Place("final_layer.linear"),
}
"""The layers outside of the blocks. Where a norm has a scale and a shift alone, the authors have the shift first."""
INSIDE = {
    "attn.norm_q": Place("x_block.attn.ln_q"),
    "attn.norm_k": Place("x_block.attn.ln_k"),
    "attn.norm_added_q": Place("context_block.attn.ln_q"),
    "attn.norm_added_k": Place("context_block.attn.ln_k"),
    "attn.to_out.0": Place("x_block.attn.proj"),
    "attn.to_add_out": Place("context_block.attn.proj"),
    "attn2.norm_q": Place("x_block.attn2.ln_q"),
    "attn2.norm_k": Place("x_block.attn2.ln_k"),
    "attn2.to_out.0": Place("x_block.attn2.proj"),
    "norm1.linear": Place("x_block.adaLN_modulation.1"),
    "norm1_context.linear": Place("context_block.adaLN_modulation.1"),
    "ff.net.0.proj": Place("x_block.mlp.fc1"),
    "ff.net.2": Place("x_block.mlp.fc2"),
    "ff_context.net.0.proj": Place("context_block.mlp.fc1"),
    "ff_context.net.2": Place("context_block.mlp.fc2"),
    **{f"attn.to_{one}": Place("x_block.attn.qkv", part, 3) for part, one in enumerate("qkv")},
    **{f"attn.add_{one}_proj": Place("context_block.attn.qkv", part, 3) for part, one in enumerate("qkv")},
    **{f"attn2.to_{one}": Place("x_block.attn2.qkv", part, 3) for part, one in enumerate("qkv")},
}
"""The layers of a block."""


def place(config: Mapping[str, Any], name: str) -> Place:
    """The place of a layer of the transformer with this config."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    blocks, _, rest = name.partition(".")
    number, _, layer = rest.partition(".")
    if blocks != "transformer_blocks" or layer not in INSIDE:
        raise ValueError(f"{name} has no place in SD3's original network")
    found = INSIDE[layer]
    last = int(number) == config["num_layers"] - 1 and layer == "norm1_context.linear"  # has a scale and a shift alone
    return found._replace(layer=f"joint_blocks.{number}.{found.layer}", swapped=last)


def read_kohya(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor, str]]:
    """The layers that a LoRA in kohya's layout adapts; see `dmdr_models.families.original_layout.diffusers_lora`."""
    blocks = [f"transformer_blocks.{number}.{layer}" for number in range(config["num_layers"]) for layer in INSIDE]
    return diffusers_lora(state, [*OUTSIDE, *blocks], partial(place, config))
