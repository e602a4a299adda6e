"""The first lines of a run."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.header import header, short
from torch import nn

REWARD = {"name": "class-label", "checkpoint": "classifier"}


def trainer(step: int = 0) -> Any:
    """A trainer of two processes with networks of 6 and 12 parameters, 4 of which are frozen."""
    guidance = nn.Sequential(nn.Linear(3, 1), nn.Linear(7, 1))
    guidance[0].requires_grad_(False)
    tower = SimpleNamespace(module=nn.Linear(999, 1).requires_grad_(False))
    return SimpleNamespace(
        step=step,
        world=2,
        device=torch.device("cpu"),
        family=SimpleNamespace(size=(32, 32)),
        generator=SimpleNamespace(module=nn.Linear(5, 1)),
        guidance=SimpleNamespace(module=guidance),
        rewards=[SimpleNamespace(info=SimpleNamespace(name="class-label"), tower=tower)],
    )


def test_the_header_of_a_run(make_recipe: Callable[..., Recipe]) -> None:
    joint = [
        {"kind": "distribution_matching"},
        {"kind": "refl", "start": 6, "weight": 0.25, "reward": REWARD},
        {"kind": "refl", "start": 6, "stop": 8, "reward": REWARD | {"name": "clip"}},
    ]
    settings = make_recipe(objectives=joint, optim__batch_size=12, optim__accumulation=3)
    assert header(settings, trainer(), ["memory: 3 GiB", "time: 2 hours"]).splitlines()[1:] == [
        "  model    sit in teacher, 32 pixels",
        "  student  1 step (sde), all weights, from the teacher; fp32, ZeRO 0",
        "           generator: 6 parameters, 6 trained",
        "           fake score: 12 parameters, 8 trained",
        "           reward class-label: 1 k parameters, frozen",
        "  batch    12 = 2 per process x 3 accumulated x 2 processes on cpu",
        "  stages   cold start, steps 1 to 6: distribution_matching",
        "           joint, steps 7 to 10: distribution_matching, refl-1 (class-label, weight 0.25), refl-2 (clip)",
        "  output   out",
        "  plan     memory: 3 GiB",
        "           time: 2 hours",
    ]


def test_the_header_says_how_often_a_rollout_is_used(make_recipe: Callable[..., Recipe]) -> None:
    joint = [{"kind": "distribution_matching"}, {"kind": "grpo", "reward": {"name": "ocr"}}]
    settings = make_recipe(objectives=joint, rollout={"steps": 2, "group_size": 2, "updates": 3})
    said = header(settings, trainer(), [])
    assert "x 2 processes on cpu, up to 3 updates of the generator for each rollout\n" in said


def test_a_run_that_goes_on_says_so(make_recipe: Callable[..., Recipe]) -> None:
    settings = make_recipe(model__generator_lora={"rank": 8, "alpha": 8}, run__init_from="runs/first")
    going_on = trainer(step=3)
    going_on.generator.module.base = nn.ModuleList([nn.Linear(9, 1).requires_grad_(False), nn.Linear(2, 1)])
    said = header(settings, going_on, [])
    assert "  student  1 step (sde), LoRA of rank 8, from runs/first; fp32, ZeRO 0\n" in said
    assert "           network under both LoRAs: 10 parameters, frozen\n           generator: " in said
    assert said.endswith("  output   out, resumed at step 3")


@pytest.mark.parametrize(("number", "text"), [(532, "532"), (1275408, "1.28 M"), (8.06e9, "8.06 B"), (1000, "1 k")])
def test_counts_are_short(number: float, text: str) -> None:
    assert short(number) == text
