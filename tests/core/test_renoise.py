import math

import pytest
import torch
from dmdr_core import BetaRenoise, UniformRenoise, cosine_anneal

DRAWS = 100_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def kolmogorov_smirnov(sample, a, b):
    """Return the largest distance of a sample's distribution from Beta(a, b), which is integrated numerically."""
    grid = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    density = grid ** (a - 1) * (1 - grid) ** (b - 1)
    cdf = torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumulative_trapezoid(density, grid)])
    cdf = cdf / cdf[-1]
    expected = cdf[(sample.double().sort().values * 200_000).round().long()]
    rank = torch.arange(len(sample) + 1, dtype=torch.float64) / len(sample)
    return max((expected - rank[:-1]).abs().max().item(), (rank[1:] - expected).abs().max().item())


@pytest.mark.parametrize(
    ("renoise", "step", "a", "b"),
    [
        (BetaRenoise(anneal_steps=1000), 0, 4.0, 1.5),
        (BetaRenoise(anneal_steps=1000), 500, 2.5, 1.25),
        (BetaRenoise(anneal_steps=1000), 1000, 1.0, 1.0),
        (BetaRenoise(anneal_steps=1000), 9999, 1.0, 1.0),
        (BetaRenoise(anneal_steps=0), 0, 1.0, 1.0),
        (BetaRenoise(anneal_steps=math.inf), 9999, 4.0, 1.5),
        (BetaRenoise(2.0, 7.0, anneal_steps=10), 0, 2.0, 7.0),
        (UniformRenoise(), 0, 1.0, 1.0),
        (UniformRenoise(), 9999, 1.0, 1.0),
    ],
)
def test_distribution(renoise, step, a, b):
    tau = renoise.sample(DRAWS, step, seeded())
    assert tau.shape == (DRAWS,)
    assert tau.dtype == torch.float32
    mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
    assert tau.double().mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / DRAWS))
    assert tau.double().var().item() == pytest.approx(variance, rel=0.02)
    assert kolmogorov_smirnov(tau, a, b) < 1.95 / math.sqrt(DRAWS)  # the 0.1 % level


def test_the_check_above_can_tell_neighbours_apart():
    tau = BetaRenoise(4.0, 1.6, anneal_steps=math.inf).sample(DRAWS, 0, seeded())
    assert kolmogorov_smirnov(tau, 4.0, 1.5) > 1.95 / math.sqrt(DRAWS)


@pytest.mark.parametrize(("alpha", "beta"), [(0.001, 0.001), (1e-3, 5.0), (1e6, 1e-3), (1e-3, 1e6), (1.0, 1.0)])
def test_never_exactly_zero_or_one(alpha, beta):
    tau = BetaRenoise(alpha, beta, anneal_steps=math.inf).sample(10_000, 0, seeded())
    assert ((tau > 0) & (tau < 1)).all()


@pytest.mark.parametrize("renoise", [BetaRenoise(anneal_steps=10), UniformRenoise()])
def test_a_list_of_generators_makes_samples_independent_of_the_split(renoise):
    whole = renoise.sample(6, 3, [seeded(i) for i in range(6)])
    halves = [renoise.sample(3, 3, [seeded(i) for i in rows]) for rows in (range(3), range(3, 6))]
    assert torch.equal(whole, torch.cat(halves))
    assert len(set(whole.tolist())) == 6


@pytest.mark.parametrize("renoise", [BetaRenoise(anneal_steps=10), UniformRenoise()])
def test_the_device_is_the_callers(renoise):
    assert renoise.sample(4, 0, device="meta").device.type == "meta"
    assert renoise.sample(4, 0, seeded(), device="meta").device.type == "meta"


def test_draws_are_made_in_float64():
    """In float64 a time near 1 has as fine steps as a time near 0; it is rounded afterwards."""
    expected = torch.rand(40, generator=seeded(), dtype=torch.float64).float()
    assert torch.equal(UniformRenoise().sample(40, 0, seeded()), expected)
    shape = torch.tensor([4.0, 1.5], dtype=torch.float64).expand(40, 2)
    x, y = torch._standard_gamma(shape, generator=seeded()).unbind(1)
    assert torch.equal(BetaRenoise(anneal_steps=10).sample(40, 0, seeded()), (x / (x + y)).float())


@pytest.mark.parametrize("renoise", [BetaRenoise(anneal_steps=10), UniformRenoise()])
def test_the_generator_alone_decides(renoise):
    generator = seeded()
    first = renoise.sample(4, 0, generator)
    torch.manual_seed(1)
    assert torch.equal(first, renoise.sample(4, 0, seeded()))
    assert not torch.equal(first, renoise.sample(4, 0, generator))


@pytest.mark.parametrize("k", [0, 1, 17, 50, 99, 100, 101, 10_000])
def test_cosine_anneal_formula(k):
    c = 0.5 * (1 + math.cos(math.pi * min(k / 100, 1)))
    assert cosine_anneal(0.5, 0.0, k, 100) == pytest.approx(0.5 * c, abs=1e-15)
    assert cosine_anneal(4.0, 1.0, k, 100) == pytest.approx(1 + 3 * c, abs=1e-15)


def test_cosine_anneal_ends_exactly():
    assert [cosine_anneal(0.3, 0.1, k, 7) for k in (7, 8, 700)] == [0.1] * 3
    assert cosine_anneal(0.3, 0.1, 6, 7) > 0.1
    assert cosine_anneal(0.3, 0.1, 0, 0) == 0.1
    assert cosine_anneal(0.3, 0.1, 10**9, math.inf) == pytest.approx(0.3)
    assert isinstance(cosine_anneal(1, 0, 5, 5), float)
