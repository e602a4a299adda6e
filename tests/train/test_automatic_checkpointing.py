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
from dmdr_train.planning.plan import make_plan, more_checkpointing
from dmdr_train.planning.table import short_lines
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.runner import with_automatic

CPU = torch.device("cpu")
RecipeMaker = Callable[..., Recipe]
BLOCKS = {"network/4": 15e9, "network/2": 30e9, "network": 60e9}
"""Bytes of activations that the network saves, of 90e9."""
OTHERS = {"vae": 5e9, "rewards": 3e9}
"""Bytes that the others save, of 10e9."""
MATCHING = {"kind": "distribution_matching"}
REFL = {"kind": "refl", "reward": {"name": "aesthetic"}}


Maker = Callable[..., Recipe]


@pytest.fixture
def automatic(make_recipe: RecipeMaker, toy_costs: Costs, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """Make a recipe with `auto`, and with an objective that sees pictures."""

    def costs(settings: Recipe) -> Costs:
        saved = {**BLOCKS, **OTHERS}
        parts = settings.memory.gradient_checkpointing
        network, scoring = (sum(saved[part] for part in parts if (part in BLOCKS) == kind) for kind in (True, False))
        return replace(
            toy_costs, generator=Cost(10, 20, held=int(90e9 - network)), decoder=Cost(10, 20, peak=int(10e9 - scoring))
        )

    monkeypatch.setattr("dmdr_train.planning.checkpointing.costs_of", costs)

    def make(**changes: Any) -> Recipe:
        basis = {"memory": {"gradient_checkpointing": "auto"}, "optim__batch_size": 1, "objectives": [MATCHING, REFL]}
        return make_recipe(**{**basis, **changes})

    return make


@pytest.mark.parametrize(
    ("memory", "parts"),
    [
        (120, []),
        (110, ["vae", "rewards"]),
        (100, ["network/4"]),
        (95, ["network/4", "vae", "rewards"]),
        (83, ["network/2"]),
        (75, ["network/2", "vae", "rewards"]),
        (50, ["network"]),
        (42, ["network", "vae", "rewards"]),
        (10, ["network", "vae", "rewards"]),
    ],
)
def test_automatic_checkpointing_is_the_least_that_fits(
    memory: int, parts: list[str], automatic: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The activations are 100e9 bytes at most, and GPUs are filled to .855."""
    plan = make_plan(automatic(), find_gpu("h100"), gpu_memory=memory)
    assert plan.checkpointing == parts
    assert any(line.startswith("gradient checkpointing: auto is ") for line in short_lines(plan))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory * 1e9))
    chosen, line = automatic_checkpointing(automatic(), torch.device("cuda"), 1)
    assert chosen == parts
    assert line == f"memory.gradient_checkpointing: auto is {', '.join(parts) or 'none'}"


def test_what_a_recipe_does_not_have_is_not_checkpointed(automatic: Maker) -> None:
    plan = make_plan(automatic(objectives=[MATCHING]), find_gpu("h100"), gpu_memory=50)
    assert plan.checkpointing == ["network"]


@pytest.mark.parametrize(
    ("parts", "every", "more"),
    [
        ([], 0, [["network/4"], ["network/2"], ["network"], ["vae"], ["rewards"]]),
        (["network/4", "vae"], 4, [["vae", "network/2"], ["vae", "network"], ["network/4", "vae", "rewards"]]),
        (["network", "vae", "rewards"], 1, []),
    ],
)
def test_more_checkpointing_is_suggested(parts: list[str], every: int, more: list[list[str]]) -> None:
    assert list(more_checkpointing(parts, every)) == more


def test_without_a_plan_all_is_checkpointed(automatic: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: Recipe) -> Costs:
        raise UserError("model.path", "its sizes are not known")

    monkeypatch.setattr("dmdr_train.planning.checkpointing.costs_of", unknown)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8e10))
    parts, line = automatic_checkpointing(automatic(), torch.device("cuda"), 1)
    assert parts == ["network", "vae", "rewards"]
    assert "since there is no plan (" in line


@pytest.mark.usefixtures("one_process")
def test_a_run_on_a_cpu_checkpoints_nothing_by_itself(automatic: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = with_automatic(automatic(), CPU)
    assert chosen.memory.gradient_checkpointing == []
    assert capsys.readouterr().err == "memory.gradient_checkpointing: auto is none\n"
    assert with_automatic(chosen, CPU) is chosen


@pytest.mark.parametrize("given", ["automatic", ["netwrk"], ["network/0"], ["network", "network/2"], 3])
def test_a_mistake_in_checkpointing_names_its_key(given: Any, make_recipe_dict: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError) as raised:
        parse_recipe(make_recipe_dict(memory={"gradient_checkpointing": given}))
    key = str(raised.value).split(":")[0]
    assert key in ("memory.gradient_checkpointing", "memory.gradient_checkpointing.0")
