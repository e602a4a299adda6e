"""How many kernels a step launches by its plan, and whether GPU or CPU then limits it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dmdr_train.planning.costs import Costs, Role
from dmdr_train.planning.counting import Cost
from dmdr_train.planning.gpus import KERNELS_PER_TENSOR, LAUNCH, find_gpu
from dmdr_train.planning.plan import make_plan
from dmdr_train.planning.straggling import longest
from dmdr_train.planning.table import short_lines
from dmdr_train.recipe.schema import Recipe
from dmdr_train.recipe.step_work import passes
from dmdr_train.run.build import build
from dmdr_train.training.rollouts import stratified_position

CPU = torch.device("cpu")
RecipeMaker = Callable[..., Recipe]


@pytest.mark.parametrize("positions", ["independent", "stratified"])
@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_the_longest_of_the_rollouts_that_are_computed_at_once(positions: str, samples: int) -> None:
    draws = (
        itertools.product(range(3), repeat=samples)
        if positions == "independent"
        else [[stratified_position(first, index, 3) for index in range(samples)] for first in range(3)]
    )
    most = [max(draw) for draw in draws]
    assert longest(positions, 3, samples) == pytest.approx(sum(most) / len(most))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("reuse", ["none", "sample", "states"])
def test_passes_are_those_of_a_real_step(
    reuse: str, make_recipe: RecipeMaker, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four samples at once, which go to positions up to 2 of 3, and the teacher is guided."""
    rollout = {"steps": 4, "mode": "ode", "reuse": reuse}
    settings = make_recipe(
        model__path=str(model), rollout=rollout, optim__batch_size=4, guidance={"ratio": 2, "cfg": 1.5}
    )
    trainer = build(settings, CPU)
    monkeypatch.setattr(trainer.rollouts, "choose_steps", lambda *_: torch.tensor([0, 2, 1, 0]))
    asked: list[Any] = []
    for network in (trainer.generator.module, trainer.guidance.module):
        network.register_forward_hook(lambda *_: asked.append(_))
    trainer.train_step()
    assert len(asked) == sum(passes(settings, longest=2).values())


@pytest.fixture
def toy_plan(make_recipe: RecipeMaker, toy_costs: Costs, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """toy_plan(operations, **optim) plans one-step matching where each pass has 1 to 3 kernels."""

    def toy_plan(operations: float = 10, **optim: Any) -> Any:
        each = int(operations)
        costs = replace(
            toy_costs,
            generator=Cost(each, 2 * each, kernels=1, backward_kernels=2),
            fake_score=Cost(each, 2 * each, kernels=1, backward_kernels=3),
            teacher=Cost(each, kernels=1),
            roles={"generator": Role(1000, 1000, 0, 5), "fake_score": Role(1100, 100, 2000, 3)},
        )
        monkeypatch.setattr("dmdr_train.planning.plan.costs_of", lambda settings: costs)
        monkeypatch.setattr("dmdr_train.planning.checkpointing.costs_of", lambda settings: costs)
        guidance, rollout = {"ratio": 2, "cfg": 1.0}, {"steps": 1, "mode": "sde"}
        return make_plan(make_recipe(guidance=guidance, rollout=rollout, optim=optim), find_gpu("H100"))

    return toy_plan


OPTIM = {"generator": {"lr": 1e-4}, "fake_score": {"lr": 1e-4}}


def test_samples_that_are_computed_at_once_share_their_kernels(toy_plan: Callable[..., Any]) -> None:
    """Two rollouts and updates of the fake score, a generator with its rollout, fake score and teacher; 11 tensors."""
    expected = 2 * (1 + 4) + (3 + 1 + 1) + KERNELS_PER_TENSOR * (5 + 2 * 3)
    for batch, parts in ((1, 1), (8, 1), (8, 4)):
        (stage,) = toy_plan(batch_size=batch, accumulation=parts, **OPTIM).stages
        assert stage.kernels == parts * expected


def test_a_step_takes_as_long_as_the_slower_of_gpu_and_cpu(toy_plan: Callable[..., Any]) -> None:
    for operations, launches in ((1e6, True), (1e15, False)):
        plan = toy_plan(operations, batch_size=4, accumulation=2, **OPTIM)
        (stage,) = plan.stages
        assert stage.computing == pytest.approx(stage.total / find_gpu("H100").rate("fp32"))
        assert stage.launching == stage.kernels * LAUNCH
        assert stage.seconds == (stage.launching if launches else stage.computing)
        assert plan.hours == pytest.approx(stage.steps * stage.seconds / 3600)
        said = [line for line in short_lines(plan) if "the CPU limits this" in line]
        assert len(said) == launches
        assert all(f"launches {stage.kernels:,.0f} kernels per step" in line for line in said)
