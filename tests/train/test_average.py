import pytest
import torch
from dmdr_train.distributed.averaged_weights import Average
from torch import nn


def network() -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made[1].requires_grad_(False)
    return made


def move(made: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made[0].weight.detach().clone()  # type: ignore[index]


def test_the_average_is_the_formula() -> None:
    made = network()
    expected = made[0].weight.detach().double()  # type: ignore[index]
    average = Average(made, 0.3)
    for step, decay in enumerate((2 / 11, 3 / 12, 0.3, 0.3, 0.3), start=1):  # 4 / 13 would be more
        expected = decay * expected + (1 - decay) * move(made).double()
        average.update(step)
    torch.testing.assert_close(average.shares()["0.weight"].whole().double(), expected, rtol=1e-5, atol=1e-6)
    assert average.state.keys() == {"0.weight", "0.bias"}  # what is trained


def test_a_short_run_is_not_exported_as_its_start() -> None:
    """After 30 steps of equal length, a constant decay of 0.9999 would have moved 0.2% of the way."""
    made = nn.Linear(1, 1)
    average = Average(made, 0.9999)
    start = made.weight.item()
    for step in range(1, 31):
        with torch.no_grad():
            made.weight.add_(1)
        average.update(step)
    assert 0.85 < (average.state["weight"].item() - start) / 30 < 0.95


def test_the_decay_is_the_recipes_in_a_long_run() -> None:
    made = nn.Linear(1, 1)
    average = Average(made, 0.9)
    start = made.weight.item()
    with torch.no_grad():
        made.weight.add_(1)
    average.update(10_000)
    assert average.state["weight"].item() - start == pytest.approx(0.1, rel=1e-4)


def test_applied_and_restored() -> None:
    made = network()
    average = Average(made, 0.5)
    trained = move(made)
    average.update(1)
    with average.applied():
        assert torch.equal(made[0].weight, average.shares()["0.weight"].whole())  # type: ignore[index]
        assert not torch.equal(made[0].weight, trained)  # type: ignore[index]
    assert torch.equal(made[0].weight, trained)  # type: ignore[index]
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(made[0].weight, trained)  # type: ignore[index]


def test_the_average_of_coarse_weights_is_float32() -> None:
    made = network().bfloat16()
    average = Average(made, 0.999)
    start = average.state["0.weight"].clone()
    with torch.no_grad():
        made[0].weight.add_(1)  # type: ignore[index]
    average.update(10_000)
    assert average.state["0.weight"].dtype == torch.float32
    torch.testing.assert_close(average.state["0.weight"] - start, torch.full((4,), 0.001), rtol=0.1, atol=1e-4)


def test_no_average() -> None:
    made = network()
    average = Average(made, None)
    trained = move(made)
    average.update(1)
    with average.applied():
        assert torch.equal(made[0].weight, trained)  # type: ignore[index]
    assert average.state == {}
