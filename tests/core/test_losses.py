"""Losses equal formulas in Python floats and NVIDIA's implementation, and their gradients flow as documented."""

import math

import pytest
import torch
from dmdr_core import FlowMatching, denoising_loss, dmd_gradient, dmd_loss, guided

SHAPES = [(3,), (3, 2), (3, 4, 2, 5)]


def triple(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def python_gradient(x0, real, fake, eps):
    rows = []
    for x, r, f in zip(x0.flatten().tolist(), real.flatten().tolist(), fake.flatten().tolist(), strict=True):
        rows.append((x, r, f))
    size = len(rows) // len(x0)
    result = []
    for i in range(len(x0)):
        sample = rows[i * size : (i + 1) * size]
        distance = sum(abs(x - r) for x, r, _ in sample) / size
        result += [(f - r) / (distance + eps) for _, r, f in sample]
    return torch.tensor(result, dtype=torch.float64).reshape(x0.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_dmd_gradient_formula(shape, eps):
    x0, real, fake = triple(shape)
    expected = python_gradient(x0, real, fake, eps)
    torch.testing.assert_close(dmd_gradient(x0, real, fake, eps), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_dmd_loss_has_the_promised_value_and_gradient(shape):
    x0, real, fake = triple(shape)
    x0.requires_grad_()
    g = python_gradient(x0.detach(), real, fake, 1e-8)
    loss = dmd_loss(x0, real, fake)
    torch.testing.assert_close(loss.detach(), 0.5 * ((x0 - (x0 - g)) ** 2).mean().detach(), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, x0)
    torch.testing.assert_close(gradient, g / x0.numel(), rtol=1e-13, atol=1e-15)


def spelled_out(x0, real, fake, weight=None):
    """The formula of `dmd_loss`, step by step."""
    g = dmd_gradient(x0, real, fake)
    wide = x0.to(g.dtype)
    squares = ((wide - wide.detach()) + g).square()
    if weight is not None:
        squares = squares * weight.to(g.dtype).reshape(-1, *[1] * (x0.ndim - 1))
    return 0.5 * squares.mean()


@pytest.mark.parametrize("weight", [None, torch.tensor([0.3, 0.0, 2.5])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 33, 35)])
@pytest.mark.parametrize("odd", [0.0, math.nan, math.inf])
def test_dmd_loss_equals_its_formula_bit_for_bit(shape, dtype, weight, odd):
    x0, real, fake = triple(shape, dtype)
    for i, tensor in enumerate((x0, real, fake)):
        tensor.reshape(len(tensor), -1)[i, 0] += odd
    found = []
    for loss in (dmd_loss, spelled_out):
        leaf = x0.clone().requires_grad_()
        value = loss(leaf, real, fake, weight=weight)
        (gradient,) = torch.autograd.grad(value * 0.7, leaf)
        found.append((value.detach(), gradient))
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_a_second_derivative_of_dmd_loss_is_refused():
    x0, real, fake = triple((3, 2))
    (gradient,) = torch.autograd.grad(dmd_loss(x0.requires_grad_(), real, fake), x0, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(gradient.sum(), x0)


def test_a_small_gradient_survives_a_large_sample():
    x0 = torch.full((1, 4), 1e4, requires_grad=True)
    fake = torch.tensor([[1e-5, -1e-5, 3e-5, 0.0]])
    (gradient,) = torch.autograd.grad(dmd_loss(x0, torch.zeros(1, 4), fake), x0)
    torch.testing.assert_close(gradient, fake / 1e4 / 4, rtol=1e-6, atol=0)


def test_no_gradient_reaches_the_scores_or_a_target():
    x0, real, fake = (x.requires_grad_() for x in triple((3, 2)))
    dmd_loss(x0, real, fake).backward()
    assert x0.grad is not None
    assert real.grad is None
    assert fake.grad is None
    assert not dmd_gradient(x0, real, fake).requires_grad

    prediction, target = (x.requires_grad_() for x in triple((3, 2))[:2])
    denoising_loss(prediction, target).backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction - target).detach() / 6)
    assert target.grad is None


def test_nan_becomes_zero_and_infinity_stays():
    x0, real, fake = torch.ones(4, 2), torch.zeros(4, 2), torch.full((4, 2), 3.0)
    real[0, 0] = x0[1, 1] = fake[2, 0] = math.nan
    fake[3] = torch.tensor([math.inf, -math.inf])
    assert dmd_gradient(x0, real, fake).tolist() == [[0, 0], [0, 0], [0, 3], [math.inf, -math.inf]]


def test_perfect_scores_leave_a_perfect_sample_alone():
    x0 = torch.ones(2, 3, requires_grad=True)
    dmd_loss(x0, torch.ones(2, 3), torch.ones(2, 3)).backward()
    assert x0.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_are_float32_or_better(dtype):
    working = torch.promote_types(dtype, torch.float32)
    x0, real, fake = triple((3, 40), dtype)
    wide = [x.to(working) for x in (x0, real, fake)]
    for function, count in ((dmd_gradient, 3), (dmd_loss, 3), (denoising_loss, 2)):
        result = function(*(x0, real, fake)[:count])
        assert result.dtype == working
        assert torch.equal(result, function(*wide[:count]))
    leaf = x0.requires_grad_()
    dmd_loss(leaf, real, fake).backward()
    assert leaf.grad.dtype == dtype


def test_mixed_dtypes_meet_at_the_widest():
    x0, real, fake = triple((3, 4))
    mixed = dmd_gradient(x0.bfloat16(), real.float(), fake.bfloat16())
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, dmd_gradient(x0.bfloat16().float(), real.float(), fake.bfloat16().float()))


@pytest.mark.parametrize("shape", SHAPES)
def test_denoising_loss_formula(shape):
    prediction, target, _ = triple(shape)
    pairs = list(zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True))
    expected = sum((p - q) ** 2 for p, q in pairs) / len(pairs)
    assert denoising_loss(prediction, target).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_per_sample_scales_its_loss_and_its_gradient(shape):
    x0, real, fake = triple(shape)
    weight = torch.linspace(0.0, 2.5, shape[0], dtype=torch.float64).requires_grad_()
    alone = [denoising_loss(x0[i : i + 1], real[i : i + 1]) for i in range(shape[0])]
    expected = sum(w * loss for w, loss in zip(weight.tolist(), alone, strict=True)) / shape[0]
    torch.testing.assert_close(denoising_loss(x0, real, weight), expected, rtol=1e-13, atol=0)
    leaf = x0.clone().requires_grad_()
    loss = dmd_loss(leaf, real, fake, weight=weight)
    loss.backward()
    scale = weight.detach().reshape(-1, *[1] * (x0.ndim - 1)) / x0.numel()
    torch.testing.assert_close(leaf.grad, scale * dmd_gradient(x0, real, fake), rtol=1e-13, atol=0)
    assert weight.grad is None


@pytest.mark.parametrize("function", [denoising_loss, dmd_loss])
def test_a_weight_of_one_changes_no_bit(function):
    pictures = triple((3, 4), torch.float32)[: 3 if function is dmd_loss else 2]
    assert torch.equal(function(*pictures, weight=torch.ones(3)), function(*pictures))


def test_guided():
    cond, uncond, _ = triple((3, 4))
    per_sample = torch.tensor([0.0, 1.0, 7.0])
    expected = torch.stack([uncond[i] + w * (cond[i] - uncond[i]) for i, w in enumerate([0.0, 1.0, 7.0])])
    torch.testing.assert_close(guided(cond, uncond, per_sample), expected, rtol=1e-14, atol=1e-14)
    for i, w in enumerate([0.0, 1.0, 7.0]):
        torch.testing.assert_close(guided(cond, uncond, w)[i], expected[i], rtol=1e-14, atol=1e-14)
        assert torch.equal(guided(cond, uncond, torch.tensor(w))[i], guided(cond, uncond, w)[i])
    low = guided(cond.bfloat16(), uncond.bfloat16(), 7.3)
    assert torch.equal(low, guided(cond.bfloat16().float(), uncond.bfloat16().float(), 7.3).bfloat16())


class TestAgainstModelOptimizer:
    """NVIDIA's independent implementation, `modelopt.torch.fastgen`, gives the same numbers."""

    @pytest.fixture(scope="class")
    def peer(self):
        return pytest.importorskip("modelopt.torch.fastgen")

    @pytest.mark.parametrize("shape", SHAPES[1:])
    def test_vsd_loss(self, peer, shape):
        ours, theirs = (triple(shape, torch.float32) for _ in range(2))
        ours[0].requires_grad_(), theirs[0].requires_grad_()
        loss, expected = dmd_loss(*ours, eps=1e-6), peer.losses.vsd_loss(*theirs)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        loss.backward(), expected.backward()
        torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-5, atol=1e-7)

    def test_dsm_loss(self, peer):
        prediction, x0, noise = triple((3, 4, 2, 5))
        expected = peer.losses.dsm_loss("flow", prediction, x0=x0, eps=noise)
        ours = denoising_loss(prediction, FlowMatching().target(x0, noise, 0.5))
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_flow(self, peer, dtype):
        x, v, _ = triple((3, 4, 2, 5), dtype)
        t = torch.tensor([0.001, 0.5, 1.0])
        process, rf = FlowMatching(), peer.flow_matching
        torch.testing.assert_close(process.to_x0(x, v, t), rf.pred_x0_from_flow(v, x, t))
        torch.testing.assert_close(process.add_noise(x, v, t), rf.add_noise(x, v, t))
