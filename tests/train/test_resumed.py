"""A run that was killed and went on is the run that was not, to the last bit: one table over all that could matter."""

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dmdr_train.checkpoint.find import checkpoints_in, find_checkpoint
from dmdr_train.objectives import from_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import build
from dmdr_train.run.runner import Run
from soak import contents
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")
CHANGE, STEPS = 2, 4  # the step at which the second stage begins, and the last
LORA = {"rank": 2, "alpha": 2}

# Family, what of the generator is trained, ZeRO stage, accumulation, and the last step that was saved before the kill:
# before the second stage, at its start, within it. Each two of them meet in every combination.
CASES = [
    ("sit", "lora", 0, 1, 1),
    ("sit", "full", 1, 1, 2),
    ("sit", "lora", 2, 2, 3),
    ("sit", "full", 3, 2, 1),
    ("sd3", "full", 0, 1, 2),
    ("sd3", "lora", 1, 1, 3),
    ("sd3", "full", 2, 2, 1),
    ("sd3", "lora", 3, 2, 2),
    ("sdxl", "lora", 0, 2, 3),
    ("sdxl", "full", 1, 2, 1),
    ("sdxl", "lora", 2, 1, 2),
    ("sdxl", "full", 3, 1, 3),
]


def test_each_two_meet() -> None:
    for one, other in itertools.combinations(zip(*CASES, strict=True), 2):
        assert set(zip(one, other, strict=True)) == set(itertools.product(one, other))


class Brightness:
    """A reward that reads no text, and draws from whatever generator is there."""

    info = SimpleNamespace(name="brightness")

    def score(self, images: Tensor, prompts: Any) -> Tensor:
        return images.flatten(1).mean(dim=1) * (torch.rand(()) + np.random.rand() + random.random())


@pytest.fixture
def settings(
    make_recipe: Callable[..., Recipe],
    model: Path,
    classifier: Path,
    sd3: Path,
    sdxl: Path,
    prompts: Path,
    sdxl_pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Recipe]:
    """Two stages of what the family is trained by; averages, schedules, dynamics; every step is saved."""
    matching = {"kind": "distribution_matching"}
    refl = {"kind": "refl", "weight": "auto", "ratio": 0.5, "margin": 9.0, "start": CHANGE}
    class_label = {"name": "class-label", "checkpoint": str(classifier)}
    families: dict[str, dict[str, Any]] = {
        "sit": {
            "model__path": str(model),
            "objectives": [matching, {**refl, "reward": class_label}],
            "rollout": {"steps": 2},
            "guidance": {"ratio": 2, "cfg": 1.5, "dynamics": {"steps": 3, "teacher_scale": 0.75}},
        },
        "sd3": {
            "model__path": str(sd3),
            "model__max_tokens": 8,
            "data__prompts": str(prompts),
            "objectives": [matching, {**refl, "reward": {"name": "clip", "checkpoint": "unread"}}],
            "rollout": {"steps": 2, "mode": "ode", "shift": 3.0},
            "guidance": {"ratio": 1, "cfg": 4.0, "cfg_jitter": 0.5, "dynamics": {"steps": 3}},
        },
        "sdxl": {
            "model__path": str(sdxl),
            "data": {"prompts": str(prompts), "pairs": str(sdxl_pairs)},
            "objectives": [{"kind": "regression", "stop": CHANGE}, {**matching, "start": CHANGE}],
            "guidance": {"ratio": 1, "cfg": 7.0, "cfg_jitter": 0.5},
        },
    }
    make_reward = from_recipe.make_reward

    def small_reward(key: str, reward: Any, *others: Any) -> Any:
        return Brightness() if reward.name == "clip" else make_reward(key, reward, *others)

    monkeypatch.setattr(from_recipe, "make_reward", small_reward)

    def settings(family: str, trained: str, stage: int, accumulation: int) -> Recipe:
        rates = {"lr": 1e-3, "eps": 1e-4, "schedule": "cosine"}
        return make_recipe(
            **families[family],
            model__family=family,
            model__fake_score_lora=LORA,
            model__generator_lora=LORA if trained == "lora" else None,
            optim__zero_stage=stage,
            optim__accumulation=accumulation,
            optim__generator=rates,
            optim__fake_score=rates,
            optim__ema=0.9,
            run__steps=STEPS,
            run__checkpoint_every=1,
            run__keep_last=STEPS,
            run__resume="auto",
            run__output=str(tmp_path / "out"),
        )

    return settings


def carried_out(settings: Recipe) -> dict[str, str]:
    """Begin or go on, in objects of their own -> all that the run leaves."""
    resume_from = find_checkpoint(settings, lambda text: None)
    run: Any = Run(settings, build.build(settings, CPU), resume_from)
    run.finish = run.results.begin = run.results.sample_student = lambda *_: None
    run.carry_out()
    return contents(run.folder)


@pytest.mark.bits
@pytest.mark.parametrize(("family", "trained", "stage", "accumulation", "killed"), CASES)
def test_resumed_equals_uninterrupted(
    settings: Callable[..., Recipe], family: str, trained: str, stage: int, accumulation: int, killed: int
) -> None:
    recipe = settings(family, trained, stage, accumulation)
    whole = carried_out(recipe)
    run = Path(recipe.run.output)
    for path in checkpoints_in(run / "checkpoints")[killed:]:
        shutil.rmtree(path)
    assert carried_out(recipe) == whole
    assert {"metrics.jsonl", f"checkpoints/step-0000000{STEPS}/generator.safetensors"} < whole.keys()
