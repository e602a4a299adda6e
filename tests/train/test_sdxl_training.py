"""One-step SDXL on this one process: a UNet trained whole, by regression and then by distribution matching."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_models.folder.state_dicts import save_state_dict
from dmdr_train.base.errors import UserError
from dmdr_train.commands import pairs as pairs_command
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import preflight
from dmdr_train.run.build import build
from dmdr_train.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")


@pytest.fixture
def settings(make_recipe: Callable[..., Recipe], sdxl: Path, prompts: Path, sdxl_pairs: Path) -> Callable[..., Recipe]:
    """A step of regression, then two of distribution matching."""

    def settings(**changes: Any) -> Recipe:
        basis: dict[str, Any] = {
            "model": {"family": "sdxl", "path": str(sdxl), "fake_score_lora": {"rank": 2, "alpha": 2}},
            "data": {"prompts": str(prompts), "pairs": str(sdxl_pairs)},
            "objectives": [{"kind": "regression", "stop": 1}, {"kind": "distribution_matching", "start": 1}],
            "guidance": {"ratio": 2, "cfg": 7.0, "cfg_jitter": 0.5},
            "optim__generator": {"lr": 1e-4, "eps": 1e-3},
            "optim__fake_score": {"lr": 1e-3, "eps": 1e-3},
        }
        return make_recipe(**{**basis, **changes})

    return settings


def trained(settings: Recipe, steps: int = 3) -> tuple[list[dict[str, float]], Trainer]:
    trainer = build(settings, CPU)
    return [trainer.train_step() for _ in range(steps)], trainer


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_zero_stages_agree(settings: Callable[..., Recipe], stage: int, precision: str) -> None:
    expected, trainer = trained(settings())
    assert trainer.rollouts.grid.times.tolist() == [399, 0]
    found, _ = trained(settings(optim__zero_stage=stage, optim__precision=precision))
    close = {"fp32": {"rel": 1e-3, "abs": 1e-7}, "bf16": {"rel": 0.1, "abs": 0.02}}[precision]
    for row, row_expected in zip(found, expected, strict=True):
        losses = {name: value for name, value in row_expected.items() if name.startswith("loss/")}
        assert {name: row[name] for name in losses} == pytest.approx(losses, **close)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 2}], ids=["whole", "lora"])
def test_channels_last_changes_rounding_alone(settings: Callable[..., Recipe], sdxl: Path, lora: Any) -> None:
    """Frozen convolutions of the UNet and of the decoder have the format, and what is trained does not."""
    model = {"family": "sdxl", "path": str(sdxl), "fake_score_lora": {"rank": 2, "alpha": 2}, "generator_lora": lora}
    expected, _ = trained(settings(model=model), steps=2)
    found, trainer = trained(settings(model=model, memory={"channels_last": True}), steps=2)
    for row, row_expected in zip(found, expected, strict=True):
        assert row == pytest.approx(row_expected, rel=1e-3, abs=1e-5)
    family: Any = trainer.family
    for network in (trainer.guidance.module.base, family.vae):
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] > m.stride[0]]
        frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
        assert len(frozen) > 10
        assert all(is_last(weight) for weight in frozen)
    assert not any(is_last(p) for p in trainer.generator.module.parameters() if p.requires_grad)


def is_last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_the_generator_starts_from_a_state_dict(settings: Callable[..., Recipe], sdxl: Path, tmp_path: Path) -> None:
    from dmdr_models import tiny

    other = dmdr_models.load("sdxl", tiny.sdxl(tmp_path / "other", seed=1))
    network, model = other.load_network(), {"family": "sdxl", "path": str(sdxl)}
    for file in ("unet.bin", "unet.safetensors"):
        save_state_dict(network, tmp_path / file)
        recipe = settings(model={**model, "generator": str(tmp_path / file)})
        preflight.check_model(recipe)
        expected = network.state_dict()
        started = build(recipe, CPU).generator.module.state_dict()
        assert all(torch.equal(started[name], expected[name]) for name in expected)
    (tmp_path / "unet.txt").touch()
    with pytest.raises(UserError, match=r"model.generator: .*unet.txt is no state dict: give a file that ends in"):
        preflight.check_model(settings(model={**model, "generator": str(tmp_path / "unet.txt")}))
    torch.save({"conv_in.weight": torch.zeros(1)}, tmp_path / "part.bin")
    with pytest.raises(UserError, match=r"model.generator: .*part.bin"):
        build(settings(model={**model, "generator": str(tmp_path / "part.bin")}), CPU)


def test_sdxl_knows_no_shift(settings: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"rollout.shift: shift 3: SDXL's times know no shift; use 1"):
        build(settings(rollout={"shift": 3.0}), CPU)


def test_the_manual() -> None:
    """docs/sdxl.md: the recipes that its commands name are there, and their options."""
    manual = (Path(__file__).parents[2] / "docs/sdxl.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in manual.splitlines() if line.startswith("    ") and "--config" in line]
    assert [command[0] for command in commands] == ["dmdr-train", *["deepspeed"] * 4]
    pairs, *trainings = commands
    parser = argparse.ArgumentParser()
    pairs_command.add_options(parser)
    options = parser.parse_args(pairs[2:])
    assert load_recipe(options.config).data.pairs == options.output
    for command in trainings:
        assert command[1] == "packages/dmdr-train/run.py"
        assert load_recipe(command[3], command[4:]).model.family == "sdxl"
