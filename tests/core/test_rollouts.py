"""Rollouts equal loops that are written by hand."""

import itertools

import pytest
import torch
from dmdr_core import FlowMatching, StepGrid, TimestepGrid, VariancePreserving, rollout, visit

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
FLOW = (FlowMatching(t_end=0.001), StepGrid(4, shift=3.0, t_end=0.001))
VP = (VariancePreserving(ALPHAS), TimestepGrid(4))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(dtype=torch.float64):
    return torch.randn(3, 2, generator=seeded(9), dtype=dtype)


class Model:
    """A nonlinear prediction that depends on state and time, and records its calls."""

    def __init__(self):
        self.asked = []

    def __call__(self, x_t, t):
        self.asked.append((x_t, t))
        return torch.tanh(x_t) + 0.001 * t[:, None] - 0.3


def test_sde_flow_by_hand():
    model, x, draws = Model(), noise(), seeded()
    times = StepGrid(4, 3.0, 0.001).times.double().tolist()
    states, x0 = [], None
    for k in range(4):
        if k > 0:
            x = (1 - times[k]) * x0 + times[k] * torch.randn(3, 2, generator=draws, dtype=torch.float64)
        states.append(x)
        x0 = x + (0.001 - times[k]) * (torch.tanh(x) + 0.001 * times[k] - 0.3)
    result = rollout(model, *FLOW, noise(), "sde", seeded())
    assert len(result.states) == len(model.asked) == 4
    torch.testing.assert_close(torch.stack(result.states), torch.stack(states), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.x0, x0, rtol=1e-6, atol=1e-8)


def test_ode_flow_by_hand():
    x, times, states = noise(), StepGrid(4, 3.0, 0.001).times.double().tolist(), []
    for t, t_next in itertools.pairwise(times):
        states.append(x)
        x = x + (t_next - t) * (torch.tanh(x) + 0.001 * t - 0.3)
    result = rollout(Model(), *FLOW, noise(), "ode")
    torch.testing.assert_close(torch.stack(result.states), torch.stack(states), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(result.x0, x, rtol=1e-6, atol=1e-8)


def test_sde_vp_by_hand():
    x, draws, x0, states = noise(), seeded(), None, []
    for t in (999, 749, 500, 250):
        signal, spread = ALPHAS[t].sqrt(), (1 - ALPHAS[t]).sqrt()
        if x0 is not None:
            x = signal * x0 + spread * torch.randn(3, 2, generator=draws, dtype=torch.float64)
        states.append(x)
        x0 = (x - spread * (torch.tanh(x) + 0.001 * t - 0.3)) / signal
    result = rollout(Model(), *VP, noise(), "sde", seeded())
    torch.testing.assert_close(torch.stack(result.states), torch.stack(states), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.x0, x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fresh_noise_is_as_precise_as_x0(dtype):
    start = torch.randn(3, 7, generator=seeded(9), dtype=torch.float64).to(dtype)
    first, second = rollout(lambda x_t, t: torch.zeros_like(x_t), *FLOW, start, "sde", seeded(), num_steps=2).states
    working = torch.promote_types(dtype, torch.float32)
    fresh = torch.randn(3, 7, generator=seeded(), dtype=working)
    assert torch.equal(second, FLOW[0].add_noise(first.to(working), fresh, FLOW[1].times[1]).to(dtype))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ode_vp_is_exact_for_a_single_point(steps):
    """If all data is one point, the noise never changes along the path: DDIM is exact at any number of steps."""
    point, process, grid = torch.tensor([1.5, -0.5], dtype=torch.float64), VP[0], TimestepGrid(steps)

    def predict(x_t, t):
        return (x_t - ALPHAS[t].sqrt()[:, None] * point) / (1 - ALPHAS[t]).sqrt()[:, None]

    result = rollout(predict, process, grid, noise(), "ode")
    eps = predict(noise(), grid.times[:1].expand(3))
    for x, t in zip(result.states, result.times, strict=True):
        torch.testing.assert_close(x, process.add_noise(point.expand(3, 2), eps, t), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.x0, point.expand(3, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize(("process", "grid"), [FLOW, VP])
def test_what_the_model_is_asked(process, grid, mode):
    model = Model()
    result = rollout(model, process, grid, noise(torch.bfloat16), mode, seeded())
    assert torch.equal(result.times, grid.times[:-1])
    assert result.x0.dtype == torch.float32
    for (x_t, t), state, time in zip(model.asked, result.states, result.times, strict=True):
        assert x_t is state
        assert x_t.dtype == torch.bfloat16
        assert torch.equal(t, time.expand(3))
        assert t.dtype == grid.times.dtype
    assert torch.equal(result.states[0], noise(torch.bfloat16))


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_stopping_early_is_a_prefix(mode, steps):
    whole, model = rollout(Model(), *FLOW, noise(), mode, seeded()), Model()
    part = rollout(model, *FLOW, noise(), mode, seeded(), num_steps=steps)
    assert len(part.states) == len(part.times) == len(model.asked) == steps
    assert all(torch.equal(a, b) for a, b in zip(part.states, whole.states, strict=False))
    x_t, t = part.states[-1], part.times[-1]
    assert torch.equal(part.x0, FLOW[0].to_x0(x_t, Model()(x_t, t.expand(3)), t))
    assert torch.equal(part.x0, whole.x0) == (steps == 4)


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_visit_asks_only_for_the_next_state(mode):
    whole, model = rollout(Model(), *FLOW, noise(), mode, seeded()), Model()
    walk = visit(model, *FLOW, noise(), mode, seeded())
    for k, (x_t, t) in enumerate(walk):
        assert len(model.asked) == k
        assert torch.equal(x_t, whole.states[k])
        assert torch.equal(t, whole.times[k].expand(3))
    assert k == 3


@pytest.mark.parametrize(("process", "grid"), [FLOW, VP])
def test_a_list_of_generators_makes_samples_independent_of_the_split(process, grid):
    whole = rollout(Model(), process, grid, noise(), "sde", [seeded(i) for i in range(3)])
    for i in range(3):
        alone = rollout(Model(), process, grid, noise()[i : i + 1], "sde", [seeded(i)])
        assert torch.equal(alone.x0[0], whole.x0[i])
    assert not torch.equal(whole.x0, rollout(Model(), process, grid, noise(), "sde", seeded()).x0)


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_gradient_flows_exactly_where_the_caller_wants_it(mode):
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def predict(x_t, t):
        return scale * x_t

    assert rollout(predict, *FLOW, noise(), mode, seeded()).x0.requires_grad
    with torch.no_grad():
        result = rollout(predict, *FLOW, noise(), mode, seeded())
    assert not result.x0.requires_grad
    assert not any(state.requires_grad for state in result.states)

    # Through all four steps: the derivative agrees with a finite difference.
    def final(value):
        return rollout(lambda x_t, t: value * x_t, *FLOW, noise(), mode, seeded()).x0.sum()

    (gradient,) = torch.autograd.grad(final(scale), scale)
    with torch.no_grad():
        difference = (final(scale + 1e-6) - final(scale - 1e-6)) / 2e-6
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


def test_every_trailing_shape():
    for shape in [(3,), (3, 2), (3, 4, 8, 8), (3, 4, 2, 8, 8)]:
        result = rollout(lambda x_t, t: x_t * 0.5, *FLOW, torch.randn(shape), "sde")
        assert result.x0.shape == shape
