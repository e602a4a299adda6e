import statistics

import pytest
import torch
from dmdr_core import group_advantage, hinge, relative_reward

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_hinge():
    reward = torch.tensor([0.1, 0.7, 0.9, -2.0], requires_grad=True)
    loss = hinge(reward)
    torch.testing.assert_close(loss, torch.tensor([0.6, 0.0, 0.0, 2.7]))
    loss.sum().backward()
    assert reward.grad.tolist() == [-1.0, 0.0, 0.0, -1.0]
    torch.testing.assert_close(hinge(reward, margin=1.0), torch.tensor([0.9, 0.3, 0.1, 3.0]))
    assert hinge(torch.tensor([0.5])).shape == (1,)


def test_relative_reward():
    positive = torch.tensor([0.5, 0.2], requires_grad=True)
    negative = torch.tensor([0.3, 0.4], requires_grad=True)
    reward = relative_reward(positive, negative)
    torch.testing.assert_close(reward, torch.tensor([0.25, -0.18]))
    reward.sum().backward()
    torch.testing.assert_close(positive.grad, torch.tensor([1.1, 1.1]))
    torch.testing.assert_close(negative.grad, torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(relative_reward(positive, negative, k=1.0), torch.tensor([0.7, 0.0]))


def test_relative_reward_is_the_score_of_the_combined_text():
    generator = torch.Generator().manual_seed(0)
    image, wanted, unwanted = (
        torch.nn.functional.normalize(torch.randn(5, 16, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(3)
    )
    combined = (image * (1.1 * wanted - unwanted)).sum(dim=1)
    parts = relative_reward((image * wanted).sum(dim=1), (image * unwanted).sum(dim=1))
    torch.testing.assert_close(parts, combined, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("group_size", [2, 3, 4, 12])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e30])
def test_group_advantage_formula(group_size, scale):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    advantage = group_advantage(rewards, group_size)
    for group, result in zip(rewards.split(group_size), advantage.split(group_size), strict=True):
        mean, std = statistics.fmean(group.tolist()), statistics.pstdev(group.tolist())
        torch.testing.assert_close(result, (group - mean) / std, rtol=1e-10, atol=1e-10)
        assert result.mean().item() == pytest.approx(0, abs=1e-14)
        assert result.std(correction=0).item() == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -123.456, 1e30, 1e-30])
@pytest.mark.parametrize("group_size", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_group_has_exactly_no_advantage(value, group_size, dtype):
    rewards = torch.full((group_size,), value, dtype=dtype)
    other = torch.arange(group_size, dtype=dtype)
    advantage = group_advantage(torch.cat([rewards, other]), group_size)
    assert (advantage[:group_size] == 0).all()
    assert (advantage[group_size:] != 0).any() or group_size == 1


def test_an_advantage_is_a_weight():
    rewards = torch.tensor([0.0, 1.0], requires_grad=True)
    assert not group_advantage(rewards, 2).requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic_is_float32_or_better(dtype):
    working = torch.promote_types(dtype, torch.float32)
    a, b = torch.tensor([0.3, 0.5, 0.7, 0.71]).to(dtype), torch.tensor([0.2, 0.4, 0.1, 0.9]).to(dtype)
    for function, arguments in ((hinge, (a,)), (relative_reward, (a, b))):
        assert function(*arguments).dtype == working
        assert torch.equal(function(*arguments), function(*(x.to(working) for x in arguments)))
    assert group_advantage(a, 2).dtype == working


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_an_extreme_spread_is_not_lost_in_float32(scale):
    rewards = torch.tensor([0.0, 1.0, 4.0])
    torch.testing.assert_close(group_advantage(rewards * scale, 3), group_advantage(rewards, 3))
