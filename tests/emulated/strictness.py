"""The emulated device computes the same results as the CPU, and refuses the same operations as CUDA."""

import copy
import io
from collections.abc import Callable
from typing import Any

import emulated
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICE = emulated.install()


def test_a_training_step_is_the_cpus() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(256, 5))
    theirs = copy.deepcopy(ours).to(DEVICE)
    pictures = torch.randn(2, 3, 8, 8)
    for network, x in ((ours, pictures), (theirs, pictures.to(DEVICE))):
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        network(x).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert b.device == DEVICE
        torch.testing.assert_close(a, b.cpu(), msg=lambda text, name=name: f"{name}: {text}")


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "group norm, channels last": lambda x: F.group_norm(x.to(memory_format=torch.channels_last), 2),
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "resize": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True),
    "distances": lambda x: torch.cdist(x.flatten(1), x.flatten(1)),
    "sort": lambda x: x.sort(dim=1).values,
    "a mask": lambda x: x[x > 0],
    "indices of the CPU": lambda x: x[:, torch.tensor([1, 0])],
    "a number of the CPU": lambda x: x * torch.tensor(2.0),
    "half precision": lambda x: x.to(torch.bfloat16).float(),
    "a view": lambda x: x.transpose(1, 2).reshape(2, -1)[:, ::3],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_are_the_cpus(name: str) -> None:
    x = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for device in (torch.device("cpu"), DEVICE):
        leaf = x.clone().to(device).requires_grad_()
        value = OPERATIONS[name](leaf)
        assert value.device == device
        value.square().sum().backward()
        assert leaf.grad is not None
        results.append((value.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


REFUSED: dict[str, Callable[[], Any]] = {
    "a product": lambda: ones(2, 2) @ torch.ones(2, 2),
    "a sum": lambda: ones(2, 2) + torch.ones(2, 2),
    "a sum with a tensor of one entry": lambda: ones(2) + torch.ones(1),
    "writing to the CPU's number": lambda: torch.ones(()).add_(ones()),
    "an average": lambda: ones(2).lerp_(torch.ones(2), 0.5),
    "joining": lambda: torch.cat([ones(2), torch.ones(2)]),
    "stacking numbers": lambda: torch.stack([ones(), torch.ones(())]),
    "a choice": lambda: torch.where(torch.tensor([True]), ones(1), 0.0),
    "a mask": lambda: ones(2).masked_fill(torch.tensor([True, False]), 0.0),
    "indices of the device, for the CPU": lambda: torch.ones(2)[torch.tensor([0], device=DEVICE)],
    "looking up": lambda: F.embedding(torch.tensor([0]), ones(2, 2)),
    "gathering": lambda: ones(2).gather(0, torch.tensor([0])),
    "labels": lambda: F.cross_entropy(ones(2, 3), torch.tensor([0, 1])),
    "a layer": lambda: nn.Linear(2, 2)(ones(1, 2)),
    "a convolution": lambda: nn.Conv2d(3, 2, 1)(ones(1, 3, 2, 2)),
    "a normalisation": lambda: nn.LayerNorm(2)(ones(1, 2)),
    "an output": lambda: torch.add(ones(2), ones(2), out=torch.empty(2)),
    "a generator that fills": lambda: nn.init.normal_(ones(2), generator=torch.Generator()),
    "a generator that makes": lambda: torch.randn(2, device=DEVICE, generator=torch.Generator()),
    "NumPy": lambda: np.asarray(ones(2)),
    "a layer's gradient": lambda: setattr(nn.Parameter(ones(2)), "grad", torch.ones(2)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_devices_do_not_mix(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"same device|on cpu|generator|convert|device"):
        REFUSED[name]()


def test_it_has_random_numbers_of_its_own() -> None:
    cpus = torch.get_rng_state()
    torch.manual_seed(3)
    first, second = (torch.randn(3, device=DEVICE) for _ in range(2))
    of_cpu = torch.randn(3)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(3), of_cpu)
    assert torch.equal(torch.randn(3, device=DEVICE).cpu(), first.cpu())
    assert not torch.equal(first.cpu(), second.cpu())
    torch.set_rng_state(cpus)


def test_what_is_saved_is_loaded_where_it_is_asked_for() -> None:
    file = io.BytesIO()
    torch.save({"weights": torch.arange(6.0, device=DEVICE)[2:5]}, file)
    for place in ("cpu", DEVICE, None):
        file.seek(0)
        (found,) = torch.load(file, map_location=place, weights_only=True).values()
        assert found.device == torch.device(place or DEVICE)
        assert found.tolist() == [2, 3, 4]


def test_what_the_cpu_waits_for_is_counted() -> None:
    emulated.waits.clear()
    emulated.waiting.clear()
    x = ones(3)
    y = (x * 2 + torch.tensor(1.0)).to(torch.bfloat16).sum()
    x.copy_(torch.ones(3), non_blocking=True)
    assert not emulated.waits
    y.item()
    bool(y > 1)
    x.cpu()
    x[x > 0]
    x[torch.tensor([0])] = 5.0
    x.copy_(torch.ones(3))
    assert emulated.waits == {"item": 2, "copy to the CPU": 1, "nonzero": 1, "copy from the CPU": 2}
    assert sum(emulated.waiting.values()) == 6
    assert emulated.waiting[__name__] == 6
