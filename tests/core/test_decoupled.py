"""Decoupled distribution matching: the formula entry by entry, the coupled case, and cleaner times."""

import pytest
import torch
from dmdr_core import FlowMatching, VariancePreserving, decoupled_gradient, dmd_loss, mean_distance, surrogate_loss

SHAPE = (3, 2, 4)
SCALE = 1.75


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_the_formula_entry_by_entry():
    fake, cond, ca_cond, ca_uncond = draws(4)
    n, m, a, b, w, eps = [0.5, 2.0, 1.0], [3.0, 0.1, 0.7], [1.0, -2.0, 0.3], [0.0, 1.5, -1.0], [1.0, 2.0, 7.0], 1e-3
    found = decoupled_gradient(fake, cond, ca_cond, ca_uncond, *map(torch.tensor, (w, n, m, a, b)), eps=eps)
    for i in range(3):
        for place in [(0, 0), (1, 3)]:
            f, c, p, q = (x[i][place].item() for x in (fake, cond, ca_cond, ca_uncond))
            expected = a[i] * (f - c) / (n[i] + eps) - b[i] * (w[i] - 1) * (p - q) / (m[i] + eps)
            assert found[i][place].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_at_one_renoise_time_it_is_matching_with_a_guided_teacher():
    x0, fake, cond, uncond = draws(4)
    x0.requires_grad_()
    real = uncond + SCALE * (cond - uncond)
    norm = mean_distance(x0, real)
    loss = surrogate_loss(x0, decoupled_gradient(fake, cond, cond, uncond, SCALE, norm, norm))
    coupled = dmd_loss(x0, real, fake)
    torch.testing.assert_close(loss, coupled)
    torch.testing.assert_close(*(torch.autograd.grad(each, x0)[0] for each in (loss, coupled)))


def test_gradients_reach_the_samples_alone():
    x0, fake, cond, ca_cond, ca_uncond = (x.requires_grad_() for x in draws(5))
    norm = mean_distance(x0, cond)
    direction = decoupled_gradient(fake, cond, ca_cond, ca_uncond, 2.0, norm)
    kept = direction.clone()
    loss = surrogate_loss(x0, direction)
    assert not norm.requires_grad
    assert loss.item() == pytest.approx(0.5 * direction.square().mean().item())
    loss.backward()
    torch.testing.assert_close(x0.grad, kept / kept.numel())
    assert torch.equal(direction, kept)
    assert all(x.grad is None for x in (fake, cond, ca_cond, ca_uncond))


def test_nan_becomes_zero_and_infinity_stays():
    fake, cond, ca_cond, ca_uncond = draws(4)
    fake[0, 0, 0], ca_uncond[1, 0, 1], ca_cond[2, 0, 2] = float("nan"), float("nan"), float("inf")
    found = decoupled_gradient(fake, cond, ca_cond, ca_uncond, 2.0)
    assert [found[0, 0, 0].item(), found[1, 0, 1].item(), found[2, 0, 2].item()] == [0.0, 0.0, float("-inf")]
    assert (found == 0).sum() == 2


# -- cleaner times


def test_a_time_below_is_strictly_cleaner():
    t = torch.tensor([1.0, 0.3, 1e-3])
    for share in (0.0, 0.25, 1 - 2**-24, 1.0):
        below = FlowMatching().time_below(t, torch.full((3,), share))
        assert bool((below < t).all() & (below >= 0).all())
        torch.testing.assert_close(below, share * t)


def test_timesteps_below_are_uniform():
    process = VariancePreserving(torch.linspace(0.9, 0.1, 10))
    share = (torch.arange(700) + 0.5) / 700
    below = process.time_below(torch.full((700,), 7), share)
    assert below.bincount(minlength=10).tolist() == [100] * 7 + [0] * 3
    assert process.time_below(torch.tensor([1, 9]), torch.ones(2)).tolist() == [0, 8]


def test_nothing_is_cleaner_than_clean():
    with pytest.raises(ValueError, match=r"t = \[0\] is outside"):
        FlowMatching().time_below(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"t = \[0\] is outside \[1, 1\]"):
        VariancePreserving(torch.tensor([0.9, 0.1])).time_below(torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(ValueError, match=r"fraction = \[1.5\] is outside"):
        FlowMatching().time_below(torch.ones(1), torch.tensor([1.5]))
