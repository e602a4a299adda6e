"""The network that MPS puts on a CLIP: the tokens of a picture attend to those words of a prompt that count.

A layer has two blocks. In the first the tokens attend to the words, in the second to each other, with rotary
positions (arXiv 2104.09864). In each, attention and a gated MLP (SwiGLU, arXiv 2002.05202) read the same normalised
tokens:

    h = norm(x)
    x + to_out(attention(to_q(h), to_kv(source))) + narrow(value · silu(gate))        value, gate = widen(h)

All heads share one key and one value (arXiv 1911.02150). The source is the words in the first block, and h in the
second.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmdr_rewards.networks import checkpoint_files

HEAD = 64
"""Width of an attention head."""
_WIDER = 4  # the MLP's width, as a multiple of the tokens'


class WordAttention(nn.Module):
    """Tokens of B pictures and words of B prompts -> the first token of each picture after all layers.

    width   of tokens and words
    depth   number of layers
    heads   number of attention heads in each block
    """

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        pairs = [nn.ModuleList([Block(width, heads), Block(width, heads)]) for _ in range(depth)]
        self.layers = nn.ModuleList(pairs)

    def blocks(self) -> "list[Block]":
        """All blocks, in the order in which they run."""
        return [block for block in self.modules() if isinstance(block, Block)]

    def forward(self, tokens: Tensor, words: Tensor, read: Tensor) -> Tensor:
        """Tensor[B, N, width], Tensor[B, L, width], and bool Tensor[B, L], False for words to leave out.

        Returns Tensor[B, width].
        """
        blocks = self.blocks()
        for to_words, to_each_other in zip(blocks[::2], blocks[1::2], strict=True):
            tokens = to_each_other(to_words(tokens, words, read[:, None, None]))
        return tokens[:, 0]


class Block(nn.Module):
    """One attention with its gated MLP, see the top of this module. `angles` turn queries and keys: Tensor[N, 32]."""

    angles: Tensor | None

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)
        self.widen = nn.Linear(width, 2 * _WIDER * width, bias=False)
        self.narrow = nn.Linear(_WIDER * width, width, bias=False)
        self.register_buffer("angles", None, persistent=False)

    def forward(self, x: Tensor, words: Tensor | None = None, read: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        q = self.to_q(h).unflatten(-1, (-1, HEAD)).transpose(1, 2)
        k, v = self.to_kv(h if words is None else words).unsqueeze(1).chunk(2, dim=-1)
        if self.angles is not None:
            q, k = turned(q, self.angles), turned(k, self.angles).to(v.dtype)
        k, v = (each.expand(-1, q.shape[1], -1, -1) for each in (k, v))
        seen = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=read)
        value, gate = self.widen(h).chunk(2, dim=-1)
        return x + self.to_out(seen.transpose(1, 2).flatten(2)) + self.narrow(value * F.silu(gate))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Tensor[..., N, 2·D], each pair (x[i], x[i + D]) turned by angles, Tensor[N, D]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def word_attention(tensors: Mapping[str, Tensor], tokens: int, path: Path) -> WordAttention:
    """Build the network from the tensors of the release, under its names from `layers.0.0.fn.norm.weight` on.

    tokens  the number of tokens of a picture

    Angles are computed in the precision that the file stores their speeds in, as the release does: in float16 they are
    rounded to multiples of 1/8 at the last of 257 tokens. Raises ValueError for tensors of another network.
    """
    place = "layers.0.0.fn.to_q.weight"
    inner, width = tensors[place].shape if place in tensors and tensors[place].ndim == 2 else (HEAD, HEAD)
    depth = max(1, len({match[1] for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}))
    checkpoint_files.check(tensors, _shapes(width, inner, depth), path)
    with torch.device("meta"):
        network = WordAttention(width, depth, inner // HEAD)
    network.load_state_dict(_renamed(tensors, depth), assign=True)
    for index, block in enumerate(network.blocks()[1::2]):
        speeds = tensors[f"layers.{index}.1.fn.rotary_emb.inv_freq"]
        angles = torch.arange(tokens, dtype=speeds.dtype)[:, None] * speeds
        block.angles = angles.float()
    return network


def _shapes(width: int, inner: int, depth: int) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the release's tensors."""
    wide = _WIDER * width
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(depth):
        first, second = f"layers.{index}.0.fn", f"layers.{index}.1.fn"
        for prefix in (first, second):
            shapes |= {f"{prefix}.norm.{name}": (width,) for name in ("weight", "bias")}
        shapes |= {f"{first}.to_q.weight": (inner, width), f"{first}.to_kv.weight": (2 * HEAD, width)}
        shapes |= {f"{first}.to_out.weight": (width, inner)}
        shapes |= {f"{first}.ff.0.weight": (2 * wide, width), f"{first}.ff.2.weight": (width, wide)}
        shapes |= {f"{second}.fused_attn_ff_proj.weight": (inner + 2 * HEAD + 2 * wide, width)}
        shapes |= {f"{second}.attn_out.weight": (width, inner), f"{second}.ff_out.1.weight": (width, wide)}
        shapes |= {f"{second}.rotary_emb.inv_freq": (HEAD // 2,)}
    return shapes


def _renamed(tensors: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The release's tensors under the names of `WordAttention`; one of them holds three of its matrices."""
    renamed: dict[str, Tensor] = {}
    for index in range(depth):
        first, second = f"layers.{index}.0", f"layers.{index}.1"
        names = {"norm.weight": "norm.weight", "norm.bias": "norm.bias", "to_q.weight": "to_q.weight"}
        names |= {"to_kv.weight": "to_kv.weight", "to_out.weight": "to_out.weight"}
        names |= {"ff.0.weight": "widen.weight", "ff.2.weight": "narrow.weight"}
        renamed |= {f"{first}.{ours}": tensors[f"{first}.fn.{theirs}"] for theirs, ours in names.items()}
        names = {"norm.weight": "norm.weight", "norm.bias": "norm.bias"}
        names |= {"attn_out.weight": "to_out.weight", "ff_out.1.weight": "narrow.weight"}
        renamed |= {f"{second}.{ours}": tensors[f"{second}.fn.{theirs}"] for theirs, ours in names.items()}
        fused, inner = tensors[f"{second}.fn.fused_attn_ff_proj.weight"], renamed[f"{first}.to_q.weight"].shape[0]
        parts = fused.split([inner, 2 * HEAD, len(fused) - inner - 2 * HEAD])
        renamed |= {
            f"{second}.{name}.weight": part for name, part in zip(("to_q", "to_kv", "widen"), parts, strict=True)
        }
    return renamed
