"""The counts of tools/bench: operations, exactly; seconds are not tested."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench.common import recipe
from bench.schedule import table
from bench.step import count
from dmdr_train.planning.costs import Costs
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build

CPU = torch.device("cpu")
RecipeMaker = Callable[..., Recipe]


@pytest.mark.usefixtures("one_process")
def test_a_step_makes_no_operations_besides_its_calls(tmp_path: Path) -> None:
    trainer = build(recipe("sit", "tiny", tmp_path, rollout={"steps": 2, "positions": "stratified"}), CPU)
    _, whole, calls_alone = count(trainer)
    assert whole == calls_alone > 0


def test_the_schedules_of_a_benchmark(make_recipe: RecipeMaker, toy_costs: Costs) -> None:
    """By hand, with forward 10 and backward 20, one teacher row: the authors' schedule walks to the end."""
    settings = make_recipe(rollout={"steps": 4, "mode": "ode"}, guidance={"ratio": 2})
    found = table(settings, lambda _: toy_costs)
    rest = 30 + 10 + 2 * 30 + 10  # generator, fake score at x0, its two updates, teacher
    assert [plain - rest for plain, _ in found.values()] == [10 * 12, 10 * 6.5, 10 * 4, 10 * 1.5]
