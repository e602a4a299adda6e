"""A tiny MPS with random weights, in the files that `describe("mps").fetch` downloads.

The tests and `tools/parity_mps.py` compare the reward on it, and `tools/bench tiny_rewards` measures what our code
costs.
"""

import json
from pathlib import Path
from typing import Any

import torch
from dmdr_rewards.models.mps import CONDITIONS
from safetensors.torch import save_file
from tiny_qwen import randomise
from torch import Tensor

HEAD = 64


def clip_tokenizer(folder: Path) -> int:
    """CLIP's kind of vocabulary -> the number of its entries. The end of a text also fills it up.

    It knows single bytes and the beginnings of the conditions' words, since these must fit into 77 tokens.
    """
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges: dict[tuple[str, str], None] = {}
    for word in CONDITIONS["overall"].rstrip(".").split(", "):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        merges.update(dict.fromkeys(("".join(parts[:count]), parts[count]) for count in range(1, len(parts))))
    joined = dict.fromkeys(map("".join, merges))
    words = [*letters, *(letter + "</w>" for letter in letters), *joined, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return len(words)


def clip_model(folder: Path, width: int, side: int = 32, patch: int = 8) -> Any:
    """A CLIPModel of two layers with few channels that projects to `width`; its config.json is in the folder.

    Its words differ from each other enough for some to count under a condition and others not.
    """
    from transformers import CLIPConfig, CLIPModel

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    sizes |= {"hidden_act": "gelu"}
    text = {"hidden_size": 128, "vocab_size": clip_tokenizer(folder), "bos_token_id": 0, "eos_token_id": 2}
    pixels = {"image_size": side, "patch_size": patch}
    config = CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **pixels}, projection_dim=width)
    model = CLIPModel(config)
    randomise(model)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
        model.text_model.embeddings.token_embedding.weight.mul_(10)
        model.text_model.final_layer_norm.bias.zero_()
        for layer in model.text_model.encoder.layers:
            for part in (layer.self_attn.out_proj, layer.mlp.fc2):
                part.weight.mul_(0.1)
                part.bias.mul_(0.1)
    config.save_pretrained(folder)
    return model.eval()


def cross_tensors(width: int, depth: int, heads: int, seed: int = 1) -> dict[str, Tensor]:
    """The tensors on the CLIP under the release's names. The size of the values keeps attention away from one-hot."""
    inner, wide = heads * HEAD, 4 * width
    shapes = {"0.fn.to_q": (inner, width), "0.fn.to_kv": (2 * HEAD, width), "0.fn.to_out": (width, inner)}
    shapes |= {"0.fn.ff.0": (2 * wide, width), "0.fn.ff.2": (width, wide)}
    shapes |= {"1.fn.fused_attn_ff_proj": (inner + 2 * HEAD + 2 * wide, width), "1.fn.attn_out": (width, inner)}
    shapes |= {"1.fn.ff_out.1": (width, wide)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(depth):
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            tensors[f"cross_model.layers.{layer}.{name}.weight"] = noise / shape[1] ** 0.5
        for block in (0, 1):
            prefix = f"cross_model.layers.{layer}.{block}.fn.norm"
            tensors[f"{prefix}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
            tensors[f"{prefix}.bias"] = 0.1 * torch.randn(width, generator=generator)  # zero in the release
        speeds = 1.0 / (10000 ** (torch.arange(0, HEAD, 2).float() / HEAD))
        tensors[f"cross_model.layers.{layer}.1.fn.rotary_emb.inv_freq"] = speeds
    return tensors


def save_mps(folder: Path, width: int = 64, depth: int = 2, heads: int = 2, **clip: int) -> Path:
    """Write the files, tiny -> the folder."""
    model = clip_model(folder, width, **clip)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file({**tensors, **cross_tensors(width, depth, heads)}, folder / "MPS_overall_checkpoint.safetensors")
    return folder
