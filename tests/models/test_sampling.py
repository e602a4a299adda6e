import itertools

import pytest
import torch
from dmdr_core import FlowMatching, StepGrid, VariancePreserving
from dmdr_models.drawing.sampling import guided_prediction, sample


class Gaussian:
    """Data N(mean, std²) in every element, whose flow is known in closed form."""

    process = FlowMatching()
    grid = staticmethod(StepGrid)
    mean, std = 1.5, 0.4

    def predict(self, network, x_t, t, condition):
        t = t.reshape(-1, 1, 1, 1)
        variance = ((1 - t) * self.std) ** 2 + t**2
        centred = x_t - (1 - t) * self.mean
        x0 = self.mean + (1 - t) * self.std**2 / variance * centred
        return t / variance * centred - x0

    def exact(self, noise):
        """The flow keeps quantiles: noise n ends at mean + std · n."""
        return self.mean + self.std * noise


def error(method: str, steps: int) -> float:
    family = Gaussian()
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    got = sample(family, None, {}, noise, steps, method)
    return (got - family.exact(noise)).abs().max().item()


@pytest.mark.parametrize(("method", "factor"), [("euler", 2), ("heun", 4)])
def test_orders_of_convergence(method, factor):
    errors = [error(method, steps) for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(factor, rel=0.12)
    assert errors[0] > 1e-6


def test_heun_beats_euler_and_one_step_is_the_same():
    assert error("heun", 20) < error("euler", 20) / 5
    assert error("heun", 1) == error("euler", 1)


def test_sde_renoises_by_hand():
    family = Gaussian()
    start = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    fresh = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x0 = start - family.predict(None, start, torch.ones(3), {})
    there = 0.5 * x0 + 0.5 * fresh
    expected = there - 0.5 * family.predict(None, there, torch.full((3,), 0.5), {})
    got = sample(family, None, {}, start, 2, "sde", generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(got, expected)


def test_one_step(family, noise):
    network = family.load_network()
    x, condition = torch.randn(2, 4, 4, 4, generator=noise), family.condition([1, 2])
    with torch.no_grad():
        velocity = family.predict(network, x, torch.ones(2), condition)
    for method in ("euler", "heun", "sde"):
        torch.testing.assert_close(sample(family, network, condition, x, 1, method), x + (0 - 1) * velocity)


def test_two_steps_by_hand_with_shift(family, noise):
    network = family.load_network()
    x, condition = torch.randn(2, 4, 4, 4, generator=noise), family.condition([1, 2])
    middle = 3 * 0.5 / (1 + 2 * 0.5)
    with torch.no_grad():
        v = family.predict(network, x, torch.ones(2), condition)
        there = x + (middle - 1) * v
        w = family.predict(network, there, torch.full((2,), middle), condition)
    euler = sample(family, network, condition, x, 2, "euler", shift=3.0)
    torch.testing.assert_close(euler, there - middle * w)
    heun = sample(family, network, condition, x, 2, "heun", shift=3.0)
    corrected = x + (middle - 1) * (v + w) / 2
    with torch.no_grad():
        last = family.predict(network, corrected, torch.full((2,), middle), condition)
    torch.testing.assert_close(heun, corrected - middle * last)


def test_one_generator_per_picture(family, noise):
    """A picture of "sde" does not depend on its neighbours in the batch."""
    network = family.load_network()
    x = torch.randn(3, 4, 4, 4, generator=noise)

    def seeds(*numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    together = sample(family, network, family.condition([1, 2, 3]), x, 3, "sde", generator=seeds(5, 6, 7))
    alone = sample(family, network, family.condition([2]), x[1:2], 3, "sde", generator=seeds(6))
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-5)
    other = sample(family, network, family.condition([2]), x[1:2], 3, "sde", generator=seeds(7))
    assert not torch.allclose(other, alone, atol=1e-2)


def test_guidance_scales(family, noise):
    network = family.load_network()
    x, t = torch.randn(2, 4, 4, 4, generator=noise), torch.tensor([0.3, 0.9])
    condition = family.condition([1, 2])
    with torch.no_grad():
        cond = family.predict(network, x, t, condition)
        uncond = family.predict(network, x, t, {"class_labels": torch.tensor([10, 10])})
        assert (cond - uncond).abs().max() > 1e-3
        for scale in (0.0, 0.5, 1.0, 4.0):
            got = guided_prediction(family, network, x, t, condition, scale)
            torch.testing.assert_close(got, uncond + scale * (cond - uncond), atol=1e-5, rtol=1e-5)


def test_no_guidance_costs_one_prediction_per_picture(family, noise):
    network = family.load_network()
    batches = []
    network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    x = torch.randn(2, 4, 4, 4, generator=noise)
    sample(family, network, family.condition([1, 2]), x, 2)
    sample(family, network, family.condition([1, 2]), x, 1, guidance=2.0)
    sample(family, network, family.condition([1, 2]), x, 2, "heun")
    assert batches == [2, 2, 4, 2, 2, 2]


def test_named_arguments_reach_the_network(family, noise):
    seen = []

    class Network:
        def __call__(self, x, t, class_labels, lora_scale):
            seen.append(lora_scale)
            return x

    guided_prediction(
        family, Network(), torch.zeros(1, 4, 4, 4), torch.ones(1), family.condition([1]), 2.0, lora_scale=0.5
    )
    assert seen == [0.5]


def test_what_cannot_be_sampled(family):
    with pytest.raises(ValueError, match="unknown sampling method 'ddim'; valid are euler, heun, sde"):
        sample(family, None, family.condition([1]), torch.zeros(1, 4, 4, 4), 1, "ddim")

    class Epsilon(Gaussian):
        process = VariancePreserving(torch.linspace(0.99, 0.01, 10))

    with pytest.raises(ValueError, match="heun sampler needs a flow-matching model"):
        sample(Epsilon(), None, {}, torch.zeros(1, 1, 1, 1), 2, "heun")
