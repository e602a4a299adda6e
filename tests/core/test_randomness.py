import pytest
import torch
from dmdr_core import randn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_one_generator_draws_the_batch():
    assert torch.equal(randn((4, 3), seeded()), torch.randn(4, 3, generator=seeded()))


def test_none_is_the_global_generator():
    torch.manual_seed(3)
    first = randn((4, 3))
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(4, 3))


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 4, 5, 5)])
@pytest.mark.parametrize("split", [1, 2, 3])
def test_a_list_of_generators_makes_samples_independent_of_the_split(shape, split):
    whole = randn(shape, [seeded(i) for i in range(6)])
    parts = [randn((split, *shape[1:]), [seeded(i) for i in range(k, k + split)]) for k in range(0, 6, split)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[4], torch.randn(1, *shape[1:], generator=seeded(4))[0])


def test_low_precision_noise_is_rounded_float32_noise():
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(randn((2, 50), seeded(), dtype=dtype), randn((2, 50), seeded()).to(dtype))
    wide = torch.randn(2, 50, generator=seeded(), dtype=torch.float64)
    assert torch.equal(randn((2, 50), seeded(), dtype=torch.float64), wide)


def test_the_device_is_the_callers():
    assert randn((2, 3), seeded(), device="meta").device.type == "meta"
    assert randn((2, 3), [seeded(), seeded()], device="meta").device.type == "meta"
    assert randn((2, 3), device="meta").device.type == "meta"
