"""Frozen networks in half precision equal the same networks in float32 under autocast, with half the memory."""

import copy

import pytest
import torch
from dmdr_rewards.networks.frozen_network import FrozenNetwork
from torch import Tensor, nn


class Tower(nn.Module):
    """One layer of every kind that the rewards' towers have."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16, bias=False))
        self.projection = nn.Parameter(torch.randn(16, 8))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.norm(self.patches(pixels).flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return (x + self.mlp(x)).mean(dim=1) @ self.projection


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_rounded_once_and_results_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tower, pixels = Tower().requires_grad_(False).eval(), torch.randn(2, 3, 8, 8)
    frozen = FrozenNetwork(copy.deepcopy(tower), "cpu", dtype)
    found = []
    for network in (frozen, tower):
        leaf = pixels.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            result = network(leaf).float()
        found.append((result.detach(), *torch.autograd.grad(result.square().sum(), leaf)))
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)
    kinds = {name: weight.dtype for name, weight in frozen.module.named_parameters()}
    assert {kinds["patches.weight"], kinds["mlp.0.bias"], kinds["mlp.2.weight"]} == {dtype}
    assert {kinds["norm.weight"], kinds["projection"]} == {torch.float32}
