"""Stochastic steps as Gaussian policies: against torch.distributions, by hand, and by the exact gradient of a toy."""

import math

import pytest
import torch
from dmdr_core import (
    CoefficientsPreserving,
    FlowMatching,
    StepGrid,
    TimestepGrid,
    VariancePreserving,
    final_samples,
    gaussian_kl,
    gaussian_log_density,
    gaussian_step,
    policy_loss,
    rollout,
    visited_states,
)
from torch import Tensor
from torch.distributions import Normal, kl_divergence

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
FLOW, VP = FlowMatching(), VariancePreserving(ALPHAS)
HALF_WAY = {"flow": (FLOW, torch.tensor([0.75, 0.5, 1.0]), 0.25), "vp": (VP, torch.tensor([749, 500, 999]), 250)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("kind", HALF_WAY)
def test_a_step_keeps_the_coefficients_of_the_process(kind: str, eta: float) -> None:
    """x_s = a x0 + σ (cos ε̂ + sin ε): of x0 and unit noise ε̂ there is as much as the process has at s."""
    process, t, s = HALF_WAY[kind]
    x0, implied = drawn(3, 2), drawn(3, 2, seed=1)
    x_t = process.add_noise(x0, implied, t)
    mean, std = gaussian_step(process, x_t, x0, t, s, eta)
    signal = 1 - s if kind == "flow" else ALPHAS[s].sqrt()
    spread = s if kind == "flow" else (1 - ALPHAS[s]).sqrt()
    expected = signal * x0 + spread * math.cos(eta * math.pi / 2) * implied
    torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        std.expand(3, 1), torch.as_tensor(spread * math.sin(eta * math.pi / 2)).double().expand(3, 1)
    )


@pytest.mark.parametrize(("process", "grid"), [(FLOW, StepGrid(4, 3.0)), (VP, TimestepGrid(4))])
def test_partly_fresh_noise_lies_between_the_two_other_modes(process: object, grid: object) -> None:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + 0.001 * t[:, None] - 0.3

    def end(mode: object) -> Tensor:
        return rollout(predict, process, grid, drawn(3, 2, seed=9), mode, seeded()).x0

    torch.testing.assert_close(end(CoefficientsPreserving(1.0)), end("sde"))
    torch.testing.assert_close(end(CoefficientsPreserving(1e-9)), end("ode"), rtol=1e-5, atol=1e-5)
    half = end(CoefficientsPreserving(0.5))
    assert not torch.allclose(half, end("sde"))
    assert not torch.allclose(half, end("ode"))


def test_the_log_density_is_that_of_torch() -> None:
    x, mean, std = drawn(4, 3, 2), drawn(4, 3, 2, seed=1), torch.tensor([0.5, 1.0, 2.0, 0.1]).double().view(4, 1, 1)
    expected = Normal(mean, std).log_prob(x).sum(dim=(1, 2))
    torch.testing.assert_close(6 * gaussian_log_density(x, mean, std), expected)


def test_the_divergence_is_that_of_torch() -> None:
    mean, other, std = drawn(4, 3, 2), drawn(4, 3, 2, seed=1), torch.tensor([0.5, 1.0, 2.0, 0.1]).double().view(4, 1, 1)
    expected = kl_divergence(Normal(mean, std), Normal(other, std)).sum(dim=(1, 2))
    torch.testing.assert_close(6 * gaussian_kl(mean, other, std), expected)


def test_the_surrogate_is_clipped_where_it_would_gain_more() -> None:
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([0.3, -0.3, 0.3, -0.3], dtype=torch.float64).requires_grad_()
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0], dtype=torch.float64)
    loss = policy_loss(new, old, advantage, 0.2)
    up, down = math.exp(0.3), math.exp(-0.3)
    torch.testing.assert_close(loss, torch.tensor([-2 * 1.2, -2 * down, 2 * up, 2 * 0.8], dtype=torch.float64))
    loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([0.0, -2 * down, 2 * up, 0.0], dtype=torch.float64))


GRID = StepGrid(2)
TOO_FAR = -0.5


class Linear:
    """x0 = a x + b, with a pair of parameters per sample, so that every sample has a gradient of its own."""

    def __init__(self, batch: int):
        self.a, self.b = (
            torch.full((batch, 1), value, dtype=torch.float64, requires_grad=True) for value in (0.6, 0.4)
        )

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return (x - self.a[rows] * x - self.b[rows]) / t[:, None]


def objective(a: Tensor, b: Tensor, eta: float) -> Tensor:
    """E[−(y − m)²] of the two-step rollout, in closed form: y and x_s are Gaussian."""
    cos, sin = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
    mean = a * 0.5 * b + b
    variance = a**2 * ((0.5 * a + 0.5 * cos) ** 2 + (0.5 * sin) ** 2)  # the predicted noise at t = 1 is the state
    return -(variance + (mean - TOO_FAR) ** 2)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_policy_gradient_is_the_exact_gradient(eta: float) -> None:
    """First step by its density, last step by the reward's own gradient, as RTDMD; within 4 standard errors."""
    size = 200_000
    model, mode, everyone = Linear(size), CoefficientsPreserving(eta), torch.arange(size)
    noise = drawn(size, 1, seed=3)
    t, t_next = torch.ones(size), torch.full((size,), 0.5)
    x0 = FLOW.to_x0(noise, model(noise, t, everyone), t)
    with torch.no_grad():
        state, _ = visited_states(model, FLOW, GRID, noise, torch.ones(size, dtype=torch.int64), mode, seeded(4))
        end = final_samples(model, FLOW, GRID, state, torch.ones(size, dtype=torch.int64), mode, seeded(5))
        reward = -(end - TOO_FAR).square().flatten()
    mean, std = gaussian_step(FLOW, noise, x0, t, t_next, eta)
    log_density = gaussian_log_density(state, mean, std)
    density_loss = policy_loss(log_density, log_density.detach(), reward - reward.mean(), 0.2)
    last = FLOW.to_x0(state, model(state, t_next, everyone), t_next)
    reward_loss = (last - TOO_FAR).square().flatten()
    found = torch.cat(torch.autograd.grad((density_loss + reward_loss).sum(), (model.a, model.b)), dim=1)
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.6, 0.4))
    exact = -torch.stack(torch.autograd.grad(objective(a, b, eta), (a, b)))
    error = found.std(dim=0) / size**0.5
    assert bool((error < 0.02 * exact.abs()).all()), (error, exact)
    assert bool(((found.mean(dim=0) - exact).abs() < 4 * error).all()), (found.mean(dim=0), exact, error)


def test_every_sample_goes_on_from_its_own_state() -> None:
    grid, asked = StepGrid(4), []

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        asked.append((t[0].item(), rows.tolist()))
        return torch.tanh(x) + t[:, None]

    states, positions = drawn(4, 1, seed=2), torch.tensor([4, 1, 3, 1])
    found = final_samples(predict, FLOW, grid, states, positions, "ode")
    times = grid.times.double()
    for i, position in enumerate(positions.tolist()):
        x = states[i]
        for step in range(position, 4):
            x = x + (times[step + 1] - times[step]) * (torch.tanh(x) + times[step])
        torch.testing.assert_close(found[i], x)
    assert asked == [(0.75, [1, 3]), (0.5, [1, 3]), (0.25, [1, 2, 3])]
    asked.clear()
    torch.testing.assert_close(final_samples(predict, FLOW, grid, states, positions, "ode", in_step=True), found)
    assert [rows for _, rows in asked] == [[0, 1, 2, 3]] * 3
    with pytest.raises(ValueError, match=r"chosen = \[0, 1, 3, 1\]: give one position in \[1, 5\) for each of 4"):
        final_samples(predict, FLOW, grid, states, torch.tensor([0, 1, 3, 1]), "ode")


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"eta = 0\.0: give a finite number in \(0\.0"):
        CoefficientsPreserving(0.0)
    with pytest.raises(ValueError, match=r"eta = 1\.5"):
        gaussian_step(FLOW, drawn(1, 2), drawn(1, 2), 1.0, 0.5, 1.5)
    with pytest.raises(ValueError, match=r"clip = 0\.0"):
        policy_loss(drawn(2), drawn(2), drawn(2), 0.0)
