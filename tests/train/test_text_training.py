"""Text-to-image runs on this one process: a tiny SD3, prompts, two adapters on one network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_models.networks.lora import LoRANetwork
from dmdr_train.distributed.collectives import mean_over_processes
from dmdr_train.recipe.schema import Recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.run import runner
from dmdr_train.run.build import build
from dmdr_train.training.trainer import Trainer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")


@pytest.fixture
def settings(make_recipe: Callable[..., Recipe], sd3: Path, prompts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Two adapters, four steps, both dynamics."""

    def settings(**changes: Any) -> Recipe:
        basis: dict[str, Any] = {
            "model": {
                "family": "sd3",
                "path": str(sd3),
                "max_tokens": 8,
                "generator_lora": {"rank": 4, "alpha": 8},
                "fake_score_lora": {"rank": 2, "alpha": 2},
            },
            "data__prompts": str(prompts),
            "rollout": {"steps": 4, "mode": "ode", "shift": 3.0},
            "guidance": {"ratio": 2, "cfg": 4.0, "cfg_jitter": 0.5, "dynamics": {"steps": 6}},
            "optim__generator": {"lr": 1e-2, "eps": 1e-3},
            "optim__fake_score": {"lr": 1e-2, "eps": 1e-3},
            "run__output": str(tmp_path / "out"),
            "tracking__samples": {"count": 2},
        }
        return make_recipe(**{**basis, **changes})

    return settings


def trained(settings: Recipe, steps: int = 3) -> tuple[list[dict[str, float]], Trainer]:
    trainer = build(settings, CPU)
    return [trainer.train_step() for _ in range(steps)], trainer


def adapter(engine: Any) -> dict[str, Tensor]:
    network = engine.module
    assert isinstance(network, LoRANetwork)
    return network.adapter_state()


def test_one_network_or_two_give_the_same_losses(settings: Callable[..., Recipe]) -> None:
    one, shared = trained(settings())
    two, apart = trained(settings(memory__shared_backbone=False))
    assert shared.generator.module.base is shared.guidance.module.base
    assert apart.generator.module.base is not apart.guidance.module.base
    for row, expected in zip(one, two, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-7)
    for role in ("generator", "guidance"):
        found, expected = (adapter(getattr(trainer, role)) for trainer in (shared, apart))
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_agree_on_one_network(settings: Callable[..., Recipe], stage: int) -> None:
    expected, _ = trained(settings())
    found, trainer = trained(settings(optim__zero_stage=stage))
    assert trainer.generator.module.base is trainer.guidance.module.base
    for row, row_expected in zip(found, expected, strict=True):
        assert row == pytest.approx(row_expected, rel=1e-4, abs=1e-7)


def test_zero_3_takes_two_networks(settings: Callable[..., Recipe]) -> None:
    expected, _ = trained(settings())
    found, trainer = trained(settings(optim__zero_stage=3))
    assert trainer.generator.module.base is not trainer.guidance.module.base
    for row, row_expected in zip(found, expected, strict=True):
        assert row == pytest.approx(row_expected, rel=1e-4, abs=1e-7)


@pytest.mark.bits
@pytest.mark.parametrize("changes", [{}, {"memory__shared_backbone": False}, {"optim__precision": "bf16"}], ids=str)
def test_who_learns_and_who_does_not(settings: Callable[..., Recipe], changes: dict[str, Any], sd3: Path) -> None:
    """Both adapters change; the network below them does not, to the last bit, and at scale 0 it is the teacher."""
    recipe = settings(**changes)
    trainer = build(recipe, CPU)
    engines = (trainer.generator, trainer.guidance)
    before = [{n: p.clone() for n, p in engine.module.base.named_parameters()} for engine in engines]
    for _ in range(2):
        trainer.train_step()
    for engine, old in zip(engines, before, strict=True):
        changed = {n for n, p in engine.module.base.named_parameters() if not torch.equal(p, old[n])}
        adapters = {n for n in old if "lora_" in n and (f".{engine.module.name}." in n or recipe.shares_backbone)}
        # The last block's texts go nowhere, so that what asks for them does nothing.
        assert changed == {n for n in adapters if "transformer_blocks.1.attn.add_q_proj" not in n}
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.optim.precision]
    family = dmdr_models.load("sd3", sd3, max_tokens=8, dtype=precision)
    teacher = family.load_network().requires_grad_(False)
    x, t, condition = (
        torch.randn(2, *family.latent_shape(*family.size)),
        torch.tensor([0.2, 0.9]),
        family.condition(["a cat", "a dog"]),
    )
    with torch.no_grad():
        expected = family.predict(teacher, x, t, condition)
        assert torch.equal(family.predict(trainer.guidance, x, t, condition, lora_scale=0.0), expected)


@pytest.mark.parametrize("memory", [{"gradient_checkpointing": ["network", "vae"]}, {"vae_slicing": True}], ids=str)
def test_saving_memory_changes_nothing(settings: Callable[..., Recipe], memory: dict[str, Any]) -> None:
    expected, _ = trained(settings(), steps=2)
    found, _ = trained(settings(memory=memory), steps=2)
    for row, row_expected in zip(found, expected, strict=True):
        assert row == pytest.approx(row_expected, rel=1e-5, abs=1e-8)


def test_the_split_of_a_batch_does_not_change_the_run(settings: Callable[..., Recipe]) -> None:
    whole, _ = trained(settings())
    split, _ = trained(settings(optim__accumulation=4))
    for row, expected in zip(split, whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert mean_over_processes({"a": 1.5}) == {"a": 1.5}


def test_full_weights_train_on_a_copy(settings: Callable[..., Recipe]) -> None:
    recipe = settings(model__generator_lora=None, optim__generator={"lr": 1e-4})
    rows, trainer = trained(recipe)
    assert trainer.generator.module is not trainer.guidance.module.base
    assert all(p.requires_grad for n, p in trainer.generator.module.named_parameters())
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in rows)


def test_the_optimizers_state_can_stay_on_the_cpu(settings: Callable[..., Recipe]) -> None:
    expected, _ = trained(settings())
    found, _ = trained(settings(memory__offload_optimizer=True, optim__zero_stage=2))
    for row, row_expected in zip(found, expected, strict=True):
        assert row == pytest.approx(row_expected, rel=1e-4, abs=1e-7)


def test_a_dry_run_says_which_prompts_are_cut(
    settings: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    runner.dry_run(settings())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: data.prompts: ")]
    assert len(said) == 1
    assert " are cut to the 8 tokens of text_encoder_3 (model.max_tokens); the longest has " in said[0]


# -- the work of a step


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def flops_of_parts(trainer: Trainer) -> dict[str, int]:
    """Of one sample: a text's encoding; predictions of both networks, without and with a backward pass."""
    family, networks = trainer.family, {"generator": trainer.generator.module, "fake_score": trainer.guidance.module}
    condition, t = family.condition(["a cat"]), torch.full((1,), 0.5)
    x = torch.zeros(1, *family.latent_shape(*family.size))

    def predict(role: str, scale: float) -> Tensor:
        return family.predict(networks[role], x, t, condition, lora_scale=scale)

    with torch.no_grad():
        parts = {role: flops(lambda role=role: predict(role, 1.0)) for role in networks}
        parts["teacher"] = flops(lambda: predict("fake_score", 0.0))
        parts["text"] = flops(lambda: family.condition(["a cat"]))
    for role, network in networks.items():
        parts[f"{role} trained"] = flops(lambda role=role: predict(role, 1.0).sum().backward())
        network.zero_grad(set_to_none=True)
    return parts


@pytest.mark.parametrize("reuse", ["none", "sample", "states"])
def test_the_flops_of_a_step(settings: Callable[..., Recipe], reuse: str) -> None:
    """Exactly those of docs/training.md, with four steps and five updates of the fake score."""
    size, steps, ratio = 4, 4, 5
    rollout = {"steps": steps, "mode": "ode", "shift": 3.0, "positions": "stratified", "reuse": reuse}
    made = settings(rollout=rollout, guidance={"ratio": ratio, "cfg": 4.0}, optim__batch_size=size)
    trainer = build(made, CPU)
    trainer.family.null_condition(1)  # encoded once in a run
    part = flops_of_parts(trainer)
    asked = predictions(made)
    assert asked["generator"] + 1 == {"none": 15, "sample": 2.5, "states": 5}[reuse]
    texts = ratio + 1 if reuse == "none" else 1
    expected = size * (sum(count * part[role] for role, count in asked.items()) + texts * part["text"])
    assert flops(trainer.train_step) == expected
