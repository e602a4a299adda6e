"""Training steps on the device: how often the CPU waits for it, and that the fused AdamW resumes exactly.

No backward pass may run in this process itself; it forks a process for every case.
"""

import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_rewards
import emulated
import pytest
import torch
from dmdr_train.distributed.deepspeed_engine import make_engine
from dmdr_train.distributed.deepspeed_internals import gathered, load_engine, save_engine, saved_types
from dmdr_train.distributed.process_group import start_processes
from dmdr_train.recipe.schema import Optim, Optimizer, Recipe
from dmdr_train.run.build import build
from dmdr_train.training.encode_pictures import encode_pictures
from mix_ups import folder, of_labels, of_texts
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["folder"]


def in_a_fork(function: Callable[..., Any], *given: Any) -> Any:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, given)


def device() -> torch.device:
    made = torch.device(emulated.NAME, 0)
    start_processes(made)
    return made


def counted(recipe: dict[str, Any]) -> dict[str, int]:
    """Take three steps of a recipe; return the waits of the third, by module."""
    trainer = build(Recipe.model_validate(recipe), device())
    for _ in range(3):  # the reward begins with the second, and copies its constants once
        emulated.waiting.clear()
        trainer.train_step()
    return dict(emulated.waiting)


LABELS = {
    "dmdr_train.training.trainer": 1,  # the values to log, in one transfer
    "dmdr_train.distributed.deepspeed_engine": 2,  # is the norm of the gradients finite? once per update
    "dmdr_train.base.guarded_scores": 1,  # can the reward see these pictures?
}
TEXTS = {
    "dmdr_train.training.trainer": 1,
    "deepspeed.runtime.utils": 6,  # in each update, is the norm finite? twice, and a constant is copied
}


def test_the_waits_of_a_step_with_a_reward(folder: Path) -> None:
    """Before they were counted there were 70."""
    assert in_a_fork(counted, of_labels(folder)) == LABELS


def test_sub_interval_matching_does_not_wait(folder: Path) -> None:
    """Neither do its self-consistency and the noise of a partly stochastic rollout."""
    recipe = of_labels(folder)
    recipe["rollout"] = {"steps": 2, "mode": "cps", "eta": 0.5}
    recipe["guidance"] = {**recipe["guidance"], "renoise_from": "next_state", "consistency": 0.01}
    assert in_a_fork(counted, recipe) == LABELS


def test_the_waits_of_a_step_with_text_encoders(folder: Path) -> None:
    """In bf16 with ZeRO 2 and offloaded text encoders; before they were counted there were 381."""
    recipe = of_texts(folder)
    recipe["optim"] = {**recipe["optim"], "precision": "bf16", "zero_stage": 2}
    recipe["memory"] = {"offload_text_encoders": True}
    assert in_a_fork(counted, recipe) == TEXTS


def scored(folder: Path) -> list[float]:
    """Score pictures, one by one: the first is right, and the others' values are out of range."""
    reward = dmdr_rewards.create("class-label", checkpoint=folder / "classifier", device=device())
    found = []
    for value in (0.5, 1.5, -0.5, torch.nan):
        picture = torch.full((1, 3, 16, 16), value, device=device()).requires_grad_(True)
        found.append(float(reward.score(picture, [0])))
    return found


def test_a_wrong_picture_on_the_device_has_no_score(folder: Path) -> None:
    right, *wrong = in_a_fork(scored, folder)
    assert math.isfinite(right)
    assert all(map(math.isnan, wrong))


def encoded(folder: Path, images: Path) -> tuple[Tensor, Tensor]:
    """Encode pictures as `dmdr-train pictures` does, on the device and on the CPU."""
    found = []
    for where in ("auto", "cpu"):
        recipe = of_labels(folder)
        recipe["run"] = {**recipe["run"], "device": where}
        emulated.waits.clear()
        encode_pictures(Recipe.model_validate(recipe), images / where, str(images / "classes"))
        assert bool(emulated.waits) == (where == "auto"), "not the device that was meant"
        (shard,) = (images / where).glob("*.safetensors")
        found.append(load_file(shard)["x0"])
    return found[0], found[1]


def test_pictures_are_encoded_on_the_device(folder: Path, tmp_path: Path) -> None:
    pixels = torch.randint(256, (10, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for label, picture in enumerate(pixels):
        (tmp_path / f"classes/{label}").mkdir(parents=True)
        Image.fromarray(picture.numpy()).save(tmp_path / f"classes/{label}/picture.png")
    on_device, on_cpu = in_a_fork(encoded, folder, tmp_path)
    assert len(on_device) == 10
    torch.testing.assert_close(on_device, on_cpu, rtol=1e-4, atol=1e-5)


def resumed(checkpoint: Path, stage: int, precision: str) -> tuple[bool, list[Tensor], list[Tensor]]:
    """Take four steps at once, and again with a checkpoint in the middle; return both weights."""
    where = device()
    settings = Optimizer(lr=0.02)
    optim = Optim(batch_size=2, generator=settings, fake_score=settings, zero_stage=stage, precision=precision)

    def made() -> Any:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(where)
        return make_engine(network, optim, settings, 9, where)

    def steps(engine: Any, *numbers: int) -> None:
        for number in numbers:
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(number))
            x = x.to(where, next(engine.module.parameters()).dtype)
            engine.backward(engine(x).float().square().mean())
            engine.step()

    def weights(engine: Any) -> list[Tensor]:
        parameters = list(engine.module.parameters())
        with gathered(parameters):
            return [parameter.detach().float().cpu() for parameter in parameters]

    whole, first, second = made(), made(), made()
    steps(whole, 0, 1, 2, 3)
    steps(first, 0, 1)
    (checkpoint / "two").mkdir()
    save_engine(first, checkpoint, "two", torch.save)
    with torch.serialization.safe_globals(saved_types()):
        load_engine(second, checkpoint, "two", lambda path, *_, **__: torch.load(path, weights_only=True))
    steps(second, 2, 3)
    return bool(second.optimizer.param_groups[0]["fused"]), weights(whole), weights(second)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16")])
def test_the_fused_optimizer_resumes_exactly(tmp_path: Path, stage: int, precision: str) -> None:
    fused, whole, parts = in_a_fork(resumed, tmp_path, stage, precision)
    assert fused
    assert all(map(torch.equal, whole, parts))
