"""Weights of f-divergences, against f itself and against the gradient of the divergence of two Gaussians."""

import math
from collections.abc import Callable

import pytest
import torch
from dmdr_core import divergence_weight
from dmdr_core.divergences import DIVERGENCES
from torch import Tensor

F: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda r: -r.log(),
    "softened_reverse_kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "jensen_shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "forward_kl": lambda r: r * r.log(),
}
"""f of each divergence, D_f = E_q[f(p/q)]."""
WIDE = 1e9
NAMES = pytest.mark.parametrize("name", F)


def unclamped(name: str, log_ratio: Tensor) -> Tensor:
    """h(r), without a limit and with its own value at r = 1."""
    one = DIVERGENCES[name](torch.zeros((), dtype=torch.float64))
    return divergence_weight(name, log_ratio, WIDE) * one


@NAMES
def test_the_weight_is_the_second_derivative_times_the_square(name: str) -> None:
    assert F.keys() == DIVERGENCES.keys()
    ratio = torch.tensor([0.05, 0.4, 1.0, 1.7, 12.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[name](ratio).sum(), ratio, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratio)
    ratio = ratio.detach()
    assert F[name](torch.ones(1)).item() == 0.0
    torch.testing.assert_close(unclamped(name, ratio.log()), second * ratio**2)


@NAMES
def test_the_gradient_of_the_divergence_of_two_gaussians(name: str) -> None:
    """q = N(m, 1) moves against p = N(0, 1.3²): samples x = m + ε, so that ∂x/∂m = 1."""
    x = torch.linspace(-16, 16, 20001, dtype=torch.float64)

    def log_normal(x: Tensor, mean: float, deviation: float) -> Tensor:
        return -0.5 * ((x - mean) / deviation) ** 2 - math.log(deviation * math.sqrt(2 * math.pi))

    def log_p(x: Tensor) -> Tensor:
        return log_normal(x, 0.0, 1.3)

    def log_q(x: Tensor, mean: float) -> Tensor:
        return log_normal(x, mean, 1.0)

    def divergence(mean: float) -> float:
        q = log_q(x, mean)
        return torch.trapezoid(q.exp() * F[name]((log_p(x) - q).exp()), x).item()

    mean, step = 0.8, 1e-4
    numerical = (divergence(mean + step) - divergence(mean - step)) / (2 * step)
    q = log_q(x, mean)
    scores = -x / 1.3**2 - (mean - x)
    weighted = -torch.trapezoid(q.exp() * unclamped(name, log_p(x) - q) * scores, x).item()
    assert weighted == pytest.approx(numerical, rel=1e-5)
    assert abs(numerical) > 0.05


@NAMES
def test_where_both_agree_the_weight_is_one_and_it_is_limited(name: str) -> None:
    weight = divergence_weight(name, torch.tensor([0.0, 50.0, -50.0]), limit=4.0)
    most = divergence_weight(name, torch.tensor([4.0, 0.25]).log(), limit=WIDE)
    torch.testing.assert_close(weight, torch.cat([torch.ones(1), most]))


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="divergence"):
        divergence_weight("kl", torch.zeros(2))
    with pytest.raises(ValueError, match="limit = 1 leaves no ratio but 1: give more than 1"):
        divergence_weight("jeffreys", torch.zeros(2), 1.0)
    with pytest.raises(TypeError, match="log_ratio"):
        divergence_weight("jeffreys", torch.zeros(2, dtype=torch.long))
