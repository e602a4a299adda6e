"""Sub-interval matching: with Gaussian states everything is linear, and every formula has a closed form."""

import math

import pytest
import torch
from dmdr_core import (
    FlowMatching,
    ancestral_step,
    denoising_loss,
    renoise_state,
    sub_interval_loss,
    sub_interval_target,
)

S, T, LATER = 0.35, 0.8, 0.55
MEAN = torch.tensor([0.4, -1.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.9, -0.3], [-0.3, 0.5]], dtype=torch.float64)
"""Of a state x_s, which need not be a noisy version of anything."""
EYE = torch.eye(2, dtype=torch.float64)
NOTHING = torch.zeros(2, 2, dtype=torch.float64)


def draws(seed=0, shape=(3, 2, 4)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(function, first, *times):
    """The factor of the first or the second argument, measured by the unit vectors."""
    found = function(*((EYE, NOTHING) if first else (NOTHING, EYE)), *times)
    torch.testing.assert_close(found, found[0, 0] * EYE)
    return found[0, 0].item()


def moments(t):
    """Mean and covariance of x_t for x_s ~ N(MEAN, COVARIANCE)."""
    a, sigma = factor(renoise_state, True, S, t), factor(renoise_state, False, S, t)
    return a * MEAN, a**2 * COVARIANCE + sigma**2 * EYE


def clean(x, t):
    """x - t v = (x + t² ∇log p_t(x)) / (1 - t), the x0 that the law of x_t implies."""
    mean, covariance = moments(t)
    return (x - t**2 * torch.linalg.solve(covariance, (x - mean).T).T) / (1 - t)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.7), (S, S), (S, T), (0.9, 0.95), (0.2, 1.0)])
def test_a_noisy_sample_stays_one(s, t):
    """For x_s = (1 - s) x0 + s ε, x_t has the factor 1 - t of x0 and the variance t²."""
    a, sigma = factor(renoise_state, True, s, t), factor(renoise_state, False, s, t)
    assert a * (1 - s) == pytest.approx(1 - t)
    assert a**2 * s**2 + sigma**2 == pytest.approx(t**2)


@pytest.mark.parametrize("t", [0.4, T, 0.95])
def test_the_target_is_the_velocity_on_average(t):
    """E[v* | x_t] by the regression of one Gaussian on another, against -(x + t ∇log p_t(x)) / (1 - t)."""
    a, sigma = factor(renoise_state, True, S, t), factor(renoise_state, False, S, t)
    of_state, of_noise = (factor(sub_interval_target, first, S, t) / sigma for first in (True, False))
    mean, covariance = moments(t)
    together = of_state * a * COVARIANCE + of_noise * sigma * EYE
    x = draws(shape=(5, 2))
    expected = of_state * MEAN + (together @ torch.linalg.solve(covariance, (x - mean).T)).T
    torch.testing.assert_close(expected, (x - clean(x, t)) / t)


def test_from_a_clean_state_it_is_flow_matching():
    x0, noise, t = draws(), draws(1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    process = FlowMatching()
    torch.testing.assert_close(renoise_state(x0, noise, 0.0, t), process.add_noise(x0, noise, t))
    scaled = t.reshape(-1, 1, 1) * process.target(x0, noise, t)
    torch.testing.assert_close(sub_interval_target(x0, noise, 0.0, t), scaled)


def test_the_loss_entry_by_entry():
    prediction, x_s, noise = draws(), draws(1), draws(2)
    s, t = torch.tensor([0.0, 0.3, 0.5], dtype=torch.float64), torch.tensor([0.9, 0.35, 0.5], dtype=torch.float64)
    squares = []
    for i, (s_i, t_i) in enumerate(zip(s.tolist(), t.tolist(), strict=True)):
        sigma = math.sqrt(t_i**2 - ((1 - t_i) / (1 - s_i) * s_i) ** 2)
        c = t_i + (1 - t_i) * s_i**2 / (1 - s_i) ** 2
        weight = min(1 / sigma**2, 10.0) if sigma else 10.0
        for f, x, e in zip(*(each[i].flatten().tolist() for each in (prediction, x_s, noise)), strict=True):
            squares.append(weight * (sigma * f - (c * e - sigma * x / (1 - s_i))) ** 2)
    assert sub_interval_loss(prediction, x_s, noise, s, t).item() == pytest.approx(sum(squares) / len(squares))


def test_far_from_the_state_the_weight_is_one():
    prediction, x_s, noise = draws(), draws(1), draws(2)
    sigma = factor(renoise_state, False, S, T)
    assert sigma**2 > 0.1
    plain = denoising_loss(prediction, sub_interval_target(x_s, noise, S, T) / sigma)
    torch.testing.assert_close(sub_interval_loss(prediction, x_s, noise, S, T), plain)


def test_gradients_reach_the_prediction_alone():
    prediction, x_s, noise = (x.requires_grad_() for x in (draws(), draws(1), draws(2)))
    sub_interval_loss(prediction, x_s, noise, S, T).backward()
    assert prediction.grad.any()
    assert x_s.grad is noise.grad is None


def test_the_clean_sample_is_a_martingale():
    """x0(x_t) = E[x0(x_later) | x_t], whose x0 is linear, so that the mean of the step is enough."""
    x = draws(shape=(5, 2))
    later = ancestral_step(x, clean(x, T), torch.zeros_like(x), T, LATER)
    torch.testing.assert_close(clean(later, LATER), clean(x, T))
    assert not torch.allclose(clean(x, LATER), clean(x, T))


def test_an_ancestral_step_reaches_the_law_of_the_later_time():
    """Of data in a single point: x_t ~ N((1 - t) x0, t²) becomes N((1 - later) x0, later²)."""
    of_state = factor(lambda x, y, t, later: ancestral_step(x, y, NOTHING, t, later), True, T, LATER)
    of_clean = factor(lambda x, y, t, later: ancestral_step(x, y, NOTHING, t, later), False, T, LATER)
    of_noise = ancestral_step(NOTHING, NOTHING, EYE, T, LATER)[0, 0].item()
    assert of_state * (1 - T) + of_clean == pytest.approx(1 - LATER)
    assert of_state**2 * T**2 + of_noise**2 == pytest.approx(LATER**2)
    assert ancestral_step(EYE, NOTHING, EYE, T, T).equal(EYE)
