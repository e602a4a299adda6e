"""With Gaussian data everything has a closed form, which distillation and its parts must reach.

For x0 ~ N(m, S) under flow matching, x_t ~ N((1-t) m, C_t) with C_t = (1-t)² S + t² I, and the posterior mean is
E[x0 | x_t] = m + (1-t) S C_t⁻¹ (x_t - (1-t) m). All scores here are that formula.
"""

import pytest
import torch
from dmdr_core import (
    BetaRenoise,
    FlowMatching,
    StepGrid,
    UniformRenoise,
    VariancePreserving,
    decoupled_gradient,
    denoising_loss,
    dmd_loss,
    rollout,
)

MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.2, 0.5], [0.5, 0.6]], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
UNCONDITIONAL, GUIDANCE = torch.tensor([-0.5, 0.3], dtype=torch.float64), 1.75
FLOW = FlowMatching()
VP = VariancePreserving(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def coefficients(process, t):
    """Return the factors of x0 and noise at t, measured by noising a one, so that this works for any process."""
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    return process.add_noise(one, zero, t)[:, :, None], process.add_noise(zero, one, t)[:, :, None]


def posterior_mean(process, mean, covariance, x_t, t):
    signal, spread = coefficients(process, t)
    marginal = signal**2 * covariance + spread**2 * EYE
    centred = x_t[:, :, None] - signal * mean[:, None]
    return (mean[:, None] + signal * covariance @ torch.linalg.solve(marginal, centred)).squeeze(2)


def prediction(process, mean, covariance, x_t, t):
    """Return the network output for the posterior mean: the expected target given x_t."""
    x0 = posterior_mean(process, mean, covariance, x_t, t)
    signal, spread = (c.squeeze(2) for c in coefficients(process, t))
    return process.target(x0, (x_t - signal * x0) / spread, t)


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


class LinearGenerator:
    """x0 = A z + b; its distribution is N(b, A Aᵀ)."""

    def __init__(self):
        self.weight = torch.tensor([[0.7, -0.2], [0.4, 1.3]], dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def __call__(self, z):
        return z @ self.weight.T + self.bias

    def moments(self):
        return self.bias.detach(), (self.weight @ self.weight.T).detach()

    def train(self, loss_of, steps, rate):
        """Train by gradient descent: at the optimum the gradient of every single sample is zero, so noise vanishes."""
        generator = seeded()
        for _ in range(steps):
            z = torch.randn(32, 2, generator=generator, dtype=torch.float64)
            gradients = torch.autograd.grad(loss_of(self(z), generator), (self.weight, self.bias))
            with torch.no_grad():
                for parameter, gradient in zip((self.weight, self.bias), gradients, strict=True):
                    parameter -= rate * gradient
        return self.moments()


def scores(process, model, x0, t, generator):
    """Return the x0 of the teacher and of the exact fake score at a renoised point, by predictions as in training."""
    x_t = process.add_noise(x0, torch.randn(x0.shape, generator=generator, dtype=x0.dtype), t).detach()
    return [process.to_x0(x_t, prediction(process, *moments, x_t, t), t) for moments in ((MEAN, COVARIANCE), model)]


@pytest.mark.parametrize("process", [FLOW, VP], ids=["flow", "vp"])
@pytest.mark.parametrize("renoise", [UniformRenoise(), BetaRenoise(anneal_steps=300)], ids=["uniform", "beta"])
def test_distillation_reaches_the_teachers_distribution(process, renoise):
    model, step = LinearGenerator(), iter(range(10_000))

    def loss(x0, generator):
        t = process.time_at(renoise.sample(len(x0), next(step), generator).clamp(0.02, 0.98))
        return dmd_loss(x0, *scores(process, model.moments(), x0, t, generator))

    mean, covariance = model.train(loss, steps=400, rate=0.3)
    torch.testing.assert_close(mean, MEAN, rtol=0, atol=1e-6)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tau", [0.5, 0.01])
def test_a_linear_reward_tilts_the_mean_and_keeps_the_covariance(tau):
    """Reward-tilted matching: minimise KL(q_τ ‖ p_τ) - β E_q[r] with r(x) = c·x.

    Its gradient with respect to a sample is (1-τ)(s_q - s_p)(x_τ) - β c. The scores differ by the posterior means'
    difference d = τ²/(1-τ) (s_q - s_p), so (1-τ)²/τ² d is the first term. It vanishes for every sample at once at
    covariance Σ and mean μ + β C_τ c / (1-τ)² = μ + β (Σ + (τ/(1-τ))² I) c; as τ → 0 that is μ + β Σ c, the mean of
    p·exp(β r)/Z. An eps that dwarfs the normaliser, multiplied out again, makes dmd_loss the plain difference d.
    """
    beta, c, eps = 0.3, torch.tensor([1.0, 2.0], dtype=torch.float64), 1e12
    model = LinearGenerator()

    def loss(x0, generator):
        t = torch.full((len(x0),), tau, dtype=torch.float64)
        matching = eps * x0.shape[1] * dmd_loss(x0, *scores(FLOW, model.moments(), x0, t, generator), eps=eps)
        return (1 - tau) ** 2 / tau**2 * matching - beta * (x0 @ c).mean()

    mean, covariance = model.train(loss, steps=700, rate=0.1)
    ratio = (tau / (1 - tau)) ** 2
    torch.testing.assert_close(mean, MEAN + beta * (COVARIANCE + ratio * EYE) @ c, rtol=0, atol=1e-6)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=1e-6)
    if tau < 0.1:
        torch.testing.assert_close(mean, MEAN + beta * COVARIANCE @ c, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("matching", "augmentation"), [(0.6, 0.6), (0.7, 0.3)])
def test_decoupled_matching_ends_where_the_closed_form_says(matching, augmentation):
    """The teacher is N(c, S) for the prompt and N(u, S) without one, and the fake score is exact.

    Posterior means of equal covariance differ by t² C_t⁻¹ times the difference of the means, C_t = (1-t)² S + t² I.
    The direction is zero for every sample at covariance S and mean c + (w - 1) (b/a)² C_a C_b⁻¹ (c - u), with a the
    time of matching and b that of augmentation; a = b gives the mean of a guided teacher. Elsewhere it leads there.
    """

    def direction(mean):
        def at(time, *means):
            t = torch.full((len(x0),), time, dtype=torch.float64)
            x_t = FLOW.add_noise(x0, torch.randn(x0.shape, generator=seeded(1), dtype=x0.dtype), t)
            return [posterior_mean(FLOW, each, COVARIANCE, x_t, t) for each in means]

        return decoupled_gradient(*at(matching, mean, MEAN), *at(augmentation, MEAN, UNCONDITIONAL), GUIDANCE)

    def spread(t):
        return (1 - t) ** 2 * COVARIANCE + t**2 * EYE

    x0 = torch.randn(50, 2, generator=seeded(), dtype=torch.float64)
    ratio = (augmentation / matching) ** 2 * spread(matching) @ torch.linalg.inv(spread(augmentation))
    end = MEAN + (GUIDANCE - 1) * ratio @ (MEAN - UNCONDITIONAL)
    torch.testing.assert_close(direction(end), torch.zeros(50, 2, dtype=torch.float64), rtol=0, atol=1e-12)
    step = torch.tensor([0.3, -0.1], dtype=torch.float64)
    away = matching**2 * torch.linalg.solve(spread(matching), step)
    torch.testing.assert_close(direction(end + step), away.expand(50, 2))


def test_the_denoising_loss_is_least_at_the_posterior_mean():
    generator, n, t = seeded(), 100_000, 0.6
    x0 = torch.randn(n, 2, generator=generator, dtype=torch.float64) @ square_root(COVARIANCE) + MEAN
    noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    x_t, target = FLOW.add_noise(x0, noise, t), FLOW.target(x0, noise, t)
    exact = prediction(FLOW, MEAN, COVARIANCE, x_t, torch.full((n,), t, dtype=torch.float64))
    inputs = torch.cat([x_t, torch.ones(n, 1, dtype=torch.float64)], dim=1)
    fit = torch.linalg.lstsq(inputs, exact).solution.requires_grad_()
    torch.testing.assert_close(inputs @ fit.detach(), exact, rtol=1e-9, atol=1e-9)  # it is linear
    (gradient,) = torch.autograd.grad(denoising_loss(inputs @ fit, target), fit)
    assert gradient.abs().max() < 0.02
    (wrong,) = torch.autograd.grad(denoising_loss(inputs @ (fit + 0.05), target), fit)
    assert wrong.abs().max() > 0.04


def end_points(process, grid, noise):
    return rollout(lambda x, t: prediction(process, MEAN, COVARIANCE, x, t.clamp_min(0)), process, grid, noise, "ode")


def test_an_ode_rollout_follows_the_closed_form_flow():
    """The flow's solution is x_t = (1-t) μ + C_t^½ x_1; Euler's error halves with the step."""
    noise = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    coarse, fine = (end_points(FLOW, StepGrid(n, shift=2.0), noise) for n in (128, 256))
    expected = MEAN + noise @ square_root(COVARIANCE)
    errors = [(result.x0 - expected).abs().max() for result in (coarse, fine)]
    assert 1.8 < errors[0] / errors[1] < 2.2
    torch.testing.assert_close(2 * fine.x0 - coarse.x0, expected, rtol=0, atol=1e-3)
    for state, t in zip(fine.states, fine.times.double(), strict=True):
        marginal = (1 - t) ** 2 * COVARIANCE + t**2 * EYE
        torch.testing.assert_close(state, (1 - t) * MEAN + noise @ square_root(marginal), rtol=0, atol=0.03)
