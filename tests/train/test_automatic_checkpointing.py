"""`memory.gradient_checkpointing: auto`: what it becomes, by the plan and the memory of a GPU."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.planning.at_start import automatic_checkpointing
from dmdr_train.planning.costs import Costs
from dmdr_train.planning.counting import Cost
from dmdr_train.planning.gpus import find_gpu
from dmdr_train.planning.plan import make_plan
from dmdr_train.planning.table import short_lines
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.runner import with_automatic

CPU = torch.device("cpu")
RecipeMaker = Callable[..., Recipe]
LEAST = {0: 90e9, 1: 60e9, 3: 30e9}
"""Bytes of activations by the number of parts that are checkpointed."""


@pytest.fixture
def automatic(make_recipe: RecipeMaker, toy_costs: Costs, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    def costs(settings: Recipe) -> Costs:
        return replace(toy_costs, generator=Cost(10, 20, peak=int(LEAST[len(settings.memory.gradient_checkpointing)])))

    monkeypatch.setattr("dmdr_train.planning.checkpointing.costs_of", costs)
    return make_recipe(memory={"gradient_checkpointing": "auto"}, optim__batch_size=1)


@pytest.mark.parametrize(
    ("memory", "parts"),
    [
        (110, []),
        (100, ["network"]),
        (75, ["network"]),
        (40, ["network", "vae", "rewards"]),
        (10, ["network", "vae", "rewards"]),
    ],
)
def test_automatic_checkpointing_is_the_least_that_fits(
    memory: int, parts: list[str], automatic: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(automatic, find_gpu("h100"), gpu_memory=memory)
    assert plan.checkpointing == parts
    assert any(line.startswith("gradient checkpointing: auto is ") for line in short_lines(plan))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory * 1e9))
    chosen, line = automatic_checkpointing(automatic, torch.device("cuda"), 1)
    assert chosen == parts
    assert line == f"memory.gradient_checkpointing: auto is {', '.join(parts) or 'none'}"


def test_without_a_plan_all_is_checkpointed(automatic: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: Recipe) -> Costs:
        raise UserError("model.path", "its sizes are not known")

    monkeypatch.setattr("dmdr_train.planning.checkpointing.costs_of", unknown)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8e10))
    parts, line = automatic_checkpointing(automatic, torch.device("cuda"), 1)
    assert parts == ["network", "vae", "rewards"]
    assert "since there is no plan (" in line


@pytest.mark.usefixtures("one_process")
def test_a_run_on_a_cpu_checkpoints_nothing_by_itself(automatic: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = with_automatic(automatic, CPU)
    assert chosen.memory.gradient_checkpointing == []
    assert capsys.readouterr().err == "memory.gradient_checkpointing: auto is none\n"
    assert with_automatic(chosen, CPU) is chosen


@pytest.mark.parametrize("given", ["automatic", ["netwrk"], 3])
def test_a_mistake_in_checkpointing_names_its_key(given: Any, make_recipe_dict: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError) as raised:
        parse_recipe(make_recipe_dict(memory={"gradient_checkpointing": given}))
    key = str(raised.value).split(":")[0]
    assert key in ("memory.gradient_checkpointing", "memory.gradient_checkpointing.0")
