"""The SiT network: a transformer over latent patches that predicts the flow-matching velocity.

Conventions: `t` is in [0, 1], 1 is pure noise; the prediction is v = noise - x0. The class label `num_classes` is the
null class, used for the unconditional prediction.

Source: "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
arXiv 2401.08740; the adaLN-zero block is that of DiT, arXiv 2212.09748.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

SIZES: dict[str, dict[str, int]] = {
    "S": {"width": 384, "depth": 12, "num_heads": 6},
    "B": {"width": 768, "depth": 12, "num_heads": 12},
    "L": {"width": 1024, "depth": 24, "num_heads": 16},
    "XL": {"width": 1152, "depth": 28, "num_heads": 16},
}
PATCH_SIZES = (2, 4, 8)


def preset(name: str) -> dict[str, int]:
    """The published dimensions behind a name such as "SiT-XL/2": width, depth, num_heads, patch_size.

    Raises:
        ValueError: the name is none of SiT-{S,B,L,XL}/{2,4,8}.
    """
    size, _, patch = name.removeprefix("SiT-").partition("/")
    if size not in SIZES or patch not in {str(p) for p in PATCH_SIZES}:
        raise ValueError(f"{name!r} is not a SiT; valid are SiT-{{S,B,L,XL}}/{{2,4,8}}, such as SiT-XL/2")
    return {**SIZES[size], "patch_size": int(patch)}


def sincos_positions(width: int, grid: int) -> Tensor:
    """Fixed two-dimensional sin-cos position embedding, `[grid * grid, width]`, float32, row by row.

    The first half of the channels encodes the column, the second half the row; each half is
    [sin(p·ω), cos(p·ω)] with ω_i = 10000^(-i / (width / 4)).
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line[None, :].expand(grid, grid, -1)
    rows = line[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(grid * grid, width).float()


def time_frequencies(dim: int, device: torch.device | None = None) -> Tensor:
    """f_i = 10000^(-i / (dim / 2)), `[dim / 2]`, float32."""
    half = dim // 2
    return torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=device) / half)


def time_features(t: Tensor, dim: int = 256) -> Tensor:
    """[cos(t·f), sin(t·f)] with the frequencies f of `time_frequencies`: `[B]` to `[B, dim]`, float32."""
    angles = t.float()[:, None] * time_frequencies(dim, t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention. `fused` takes torch's kernel; otherwise the same sum is written out."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool, fused: bool):
        super().__init__()
        self.num_heads = num_heads
        self.fused = fused
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.norm_k = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = self.norm_q(heads(self.to_q(x))), self.norm_k(heads(self.to_k(x))), heads(self.to_v(x))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.to_out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition; the gates start at zero (adaLN-zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, qk_norm: bool, fused: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads, qk_norm, fused)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition)).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        y = F.gelu(self.mlp["fc1"](modulate(self.norm2(x), shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.mlp["fc2"](y)


class SiTTransformer(ModelMixin, ConfigMixin):
    """SiT: latents `[B, C, S, S]`, times `[B]` in [0, 1] and labels `[B]` to a velocity `[B, C, S, S]`.

    Args:
        sample_size: side of the latent picture, a multiple of `patch_size`.
        num_classes: classes without the null class, which has the label `num_classes`.
        qk_norm: LayerNorm on queries and keys, per head.
        fused_attention: torch's scaled-dot-product kernel; the result is the same up to rounding.

    `save_pretrained` and `from_pretrained` are those of diffusers (config.json + safetensors). The position embedding
    is fixed and is not stored.

    Raises:
        ValueError: `sample_size` is not a multiple of `patch_size`, or `width` not one of 4 and of `num_heads`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        width: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        qk_norm: bool = False,
        fused_attention: bool = True,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        if width % num_heads or width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 and of num_heads {num_heads}")
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, qk_norm, fused_attention) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch_size**2 * in_channels)
        self.register_buffer("positions", sincos_positions(width, sample_size // patch_size), persistent=False)
        self.positions: Tensor
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.label_embed.weight, std=0.02)
        time: list[Any] = [self.time_embed[0], self.time_embed[2]]
        for linear in time:
            nn.init.normal_(linear.weight, std=0.02)
        zero: list[Any] = [block.modulation for block in self.blocks] + [self.modulation_out, self.proj_out]
        for linear in zero:
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        dtype = self.patch_embed.weight.dtype
        condition = self.time_embed(time_features(t).to(dtype)) + self.label_embed(class_labels)
        h = self.patch_embed(x.to(dtype)).flatten(2).transpose(1, 2) + self.positions.to(dtype)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = self._gradient_checkpointing_func(block, h, condition)
            else:
                h = block(h, condition)
        shift, scale = self.modulation_out(F.silu(condition)).chunk(2, dim=-1)
        return self._unpatchify(self.proj_out(modulate(self.norm_out(h), shift, scale)))

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """`[B, (S/p)², p·p·C]` to `[B, C, S, S]`; within a patch the channel runs fastest."""
        config: Any = self.config
        p, grid = config.patch_size, config.sample_size // config.patch_size
        y = patches.unflatten(1, (grid, grid)).unflatten(-1, (p, p, config.in_channels))
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
