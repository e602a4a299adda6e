"""Adversarial losses and the gradient penalty, written out by hand."""

import math

import pytest
import torch
from dmdr_core import discriminator_loss, generator_loss, gradient_penalty


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.25])
    expected = sum(math.log1p(math.exp(-r)) + math.log1p(math.exp(f)) for r, f in ((0.5, -3.0), (2.0, 0.25))) / 2
    assert discriminator_loss("logistic", real, fake).item() == pytest.approx(expected)
    assert discriminator_loss("hinge", real, fake).item() == pytest.approx((0.5 + 0.0 + 0.0 + 1.25) / 2)
    expected = (math.log1p(math.exp(3.0)) + math.log1p(math.exp(-0.25))) / 2
    assert generator_loss("logistic", fake).item() == pytest.approx(expected)
    assert generator_loss("hinge", fake).item() == pytest.approx((3.0 - 0.25) / 2)


def test_the_best_logit_is_the_log_ratio() -> None:
    """On a grid, E_p[softplus(−D)] + E_q[softplus(D)] has no slope at D = log p/q, and rises away from it."""
    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    p = torch.distributions.Normal(0.5, 1.0).log_prob(x)
    q = torch.distributions.Normal(-0.5, 1.5).log_prob(x)

    def loss(logit: torch.Tensor) -> torch.Tensor:
        softplus = torch.nn.functional.softplus
        return torch.trapezoid(p.exp() * softplus(-logit) + q.exp() * softplus(logit), x)

    best = (p - q).requires_grad_()
    (slope,) = torch.autograd.grad(loss(best), best)
    assert slope.abs().max() < 1e-12
    for bump in (0.3 * torch.sin(x), -0.2 * torch.ones_like(x)):
        assert loss(best + bump) > loss(best) + 1e-3


def test_the_penalty_of_a_line_and_of_a_square() -> None:
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
    slope = torch.tensor([3.0, 4.0])
    assert gradient_penalty(x @ slope, x).item() == pytest.approx(12.5)
    factor = torch.tensor(2.0, requires_grad=True)
    penalty = gradient_penalty(factor * x.square().sum(dim=1), x)
    assert penalty.item() == pytest.approx(0.5 * 16 * (5.0 + 9.25) / 2)
    penalty.backward()
    assert factor.grad is not None
    assert factor.grad.item() == pytest.approx(0.5 * 4 * 2 * 2 * (5.0 + 9.25) / 2)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="kind"):
        generator_loss("wasserstein", torch.zeros(2))
    with pytest.raises(ValueError, match="fake has shape"):
        discriminator_loss("hinge", torch.zeros(2), torch.zeros(3))
