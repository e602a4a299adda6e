"""The two processes equal formulas that are computed entry by entry in Python floats."""

import math

import pytest
import torch
from dmdr_core import FlowMatching, VariancePreserving

ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, dim=0)
FLOW_TIMES = [0.0, 0.001, 0.37, 0.626, 1.0]
VP_TIMES = [0, 1, 399, 750, 999]
SHAPES = [(5,), (5, 2), (5, 3, 4, 2), (5, 2, 3, 4, 2)]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def entrywise(formula, times, *tensors):
    """Apply a formula of Python floats to every entry; sample i has time i."""
    rows = [
        [formula(t, *entries) for entries in zip(*(x[i].flatten().tolist() for x in tensors), strict=True)]
        for i, t in enumerate(times)
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(tensors[0].shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_flow_matching_formulas(shape):
    x, y, t = normal(*shape), normal(*shape, seed=1), torch.tensor(FLOW_TIMES, dtype=torch.float64)
    process = FlowMatching(t_end=0.001)
    expect = {
        "add_noise": entrywise(lambda t, x, y: (1 - t) * x + t * y, FLOW_TIMES, x, y),
        "target": entrywise(lambda t, x, y: y - x, FLOW_TIMES, x, y),
        "to_x0": entrywise(lambda t, x, y: x + (0.001 - t) * y, FLOW_TIMES, x, y),
    }
    for method, expected in expect.items():
        torch.testing.assert_close(getattr(process, method)(x, y, t), expected, rtol=1e-14, atol=1e-14)
    stepped = process.step(x, y, t, t / 2)
    torch.testing.assert_close(
        stepped, entrywise(lambda t, x, y: x - t / 2 * y, FLOW_TIMES, x, y), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_variance_preserving_formulas(shape):
    x, y, t = normal(*shape), normal(*shape, seed=1), torch.tensor(VP_TIMES)
    process, bar = VariancePreserving(ALPHAS), ALPHAS.tolist()

    def clean(t, x, y):
        return (x - math.sqrt(1 - bar[t]) * y) / math.sqrt(bar[t])

    def ddim(t, x, y):
        return math.sqrt(bar[t // 2]) * clean(t, x, y) + math.sqrt(1 - bar[t // 2]) * y

    expect = {
        "add_noise": entrywise(lambda t, x, y: math.sqrt(bar[t]) * x + math.sqrt(1 - bar[t]) * y, VP_TIMES, x, y),
        "target": y,
        "to_x0": entrywise(clean, VP_TIMES, x, y),
    }
    for method, expected in expect.items():
        torch.testing.assert_close(getattr(process, method)(x, y, t), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(process.step(x, y, t, t // 2), entrywise(ddim, VP_TIMES, x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("process", "times"),
    [(FlowMatching(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)), (VariancePreserving(ALPHAS), [1, 399, 999])],
)
def test_a_perfect_prediction_inverts_the_process(process, times):
    x0, noise, t = normal(3, 4), normal(3, 4, seed=1), torch.as_tensor(times)
    x_t = process.add_noise(x0, noise, t)
    torch.testing.assert_close(process.to_x0(x_t, process.target(x0, noise, t), t), x0, rtol=1e-12, atol=1e-12)
    t_next = t * 0 + t[0]
    stepped = process.step(x_t, process.target(x0, noise, t), t, t_next)
    torch.testing.assert_close(stepped, process.add_noise(x0, noise, t_next), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t_end", [0.0, 0.001])
def test_the_last_euler_step_is_to_x0(t_end):
    x, v, t = normal(4, 3, dtype=torch.float32), normal(4, 3, seed=1, dtype=torch.float32), torch.full((4,), 0.6)
    process = FlowMatching(t_end)
    assert torch.equal(process.step(x, v, t, torch.full((4,), t_end)), process.to_x0(x, v, t))


@pytest.mark.parametrize(
    ("process", "t"),
    [(FlowMatching(), torch.tensor(0.626)), (FlowMatching(), 0.626), (VariancePreserving(ALPHAS), torch.tensor(399))],
)
def test_a_scalar_time_is_every_samples_time(process, t):
    x, y = normal(3, 2), normal(3, 2, seed=1)
    full = torch.as_tensor(t, dtype=torch.float64 if isinstance(t, float) else None).expand(3)
    for method in ("add_noise", "target", "to_x0"):
        assert torch.equal(getattr(process, method)(x, y, t), getattr(process, method)(x, y, full))
    assert torch.equal(process.step(x, y, t, t), process.step(x, y, full, full))


@pytest.mark.parametrize(
    ("dtype", "working"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize(
    ("process", "t", "t_next"),
    [
        (FlowMatching(), torch.tensor([0.626, 0.9]), torch.tensor([0.3, 0.001])),
        (VariancePreserving(ALPHAS.float()), torch.tensor([399, 999]), torch.tensor([0, 1])),
    ],
)
def test_arithmetic_is_float32_or_better(process, t, t_next, dtype, working):
    x, y = normal(2, 50, dtype=working).to(dtype), normal(2, 50, seed=1, dtype=working).to(dtype)
    for result, exact, kept in [
        (process.add_noise(x, y, t), process.add_noise(x.to(working), y.to(working), t), dtype),
        (process.target(x, y, t), process.target(x.to(working), y.to(working), t), dtype),
        (process.step(x, y, t, t_next), process.step(x.to(working), y.to(working), t, t_next), dtype),
        (process.to_x0(x, y, t), process.to_x0(x.to(working), y.to(working), t), working),
    ]:
        assert result.dtype == kept
        assert torch.equal(result, exact.to(kept))  # one rounding, at the very end


def test_a_coarse_time_is_computed_with_in_float32():
    x, y = normal(2, 50, dtype=torch.float32), normal(2, 50, seed=1, dtype=torch.float32)
    t, process = torch.tensor([0.001, 0.626]).bfloat16(), FlowMatching(t_end=0.001)
    for method in ("add_noise", "to_x0"):
        assert torch.equal(getattr(process, method)(x, y, t), getattr(process, method)(x, y, t.float()))
    assert torch.equal(process.step(x, y, t, t / 2), process.step(x, y, t.float(), t.float() / 2))


def test_time_at():
    fraction = torch.tensor([0.0, 0.25, 0.9999, 1.0])
    assert torch.equal(FlowMatching().time_at(fraction), fraction)
    assert VariancePreserving(ALPHAS).time_at(fraction).tolist() == [0, 250, 999, 999]
    counts = VariancePreserving(ALPHAS).time_at((torch.arange(8000) + 0.5) / 8000).bincount()
    assert counts.tolist() == [8] * 1000


def test_gradient_reaches_samples_and_predictions():
    for process, t in [(FlowMatching(), torch.tensor([0.3])), (VariancePreserving(ALPHAS), torch.tensor([30]))]:
        x, y = normal(1, 3).requires_grad_(), normal(1, 3, seed=1).requires_grad_()
        for result in (process.add_noise(x, y, t), process.to_x0(x, y, t), process.step(x, y, t, t // 2)):
            assert all((g != 0).all() for g in torch.autograd.grad(result.sum(), (x, y)))


def test_the_table_is_a_copy():
    table = ALPHAS.clone().requires_grad_()
    process = VariancePreserving(table)
    with torch.no_grad():
        table.zero_()
    assert torch.equal(process.alphas_cumprod, ALPHAS)
    assert not process.alphas_cumprod.requires_grad


def test_a_table_may_begin_without_noise():
    x, y = normal(2, 3), normal(2, 3, seed=1)
    assert torch.equal(VariancePreserving(torch.tensor([1.0, 0.5])).add_noise(x, y, 0), x)


def test_variance_preserving_processes_are_compared_by_identity():
    process = VariancePreserving(ALPHAS)
    assert process == process
    assert process != VariancePreserving(ALPHAS)


@pytest.mark.parametrize(("process", "t"), [(FlowMatching(), 0.5), (VariancePreserving(ALPHAS), 399)])
def test_a_target_has_the_dtype_of_its_sample(process, t):
    x, y = normal(2, 50).bfloat16(), normal(2, 50, seed=1)
    assert torch.equal(process.target(x, y, t), process.target(x.double(), y, t).bfloat16())
