"""Whole runs on this one process: tiny SiT, two DeepSpeed engines, rewards, averages."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train.base.random_draws import Draws, seed_others
from dmdr_train.checkpoint.save import save_weights
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.deepspeed_internals import gathered
from dmdr_train.evaluation.scores import read_scores
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import runner
from dmdr_train.run.build import build
from dmdr_train.run.runner import Run
from dmdr_train.tracking.metrics_file import read_metrics
from dmdr_train.training.networks import load_family, make_networks
from dmdr_train.training.trainer import Trainer
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")


@pytest.fixture
def settings(
    make_recipe: Callable[..., Recipe], model: Path, classifier: Path, tmp_path: Path
) -> Callable[..., Recipe]:
    """A joint run of four steps, with everything switched on."""
    refl = {"kind": "refl", "weight": 0.1, "margin": 0.0, "start": 2}
    refl["reward"] = {"name": "class-label", "checkpoint": str(classifier)}

    def settings(**changes: Any) -> Recipe:
        basis: dict[str, Any] = {
            "model__path": str(model),
            "rollout": {"steps": 2},
            "objectives": [{"kind": "distribution_matching"}, refl],
            "guidance": {"ratio": 2, "cfg": 1.5, "dynamics": {"steps": 3}},
            "optim__ema": 0.9,
            "run__steps": 4,
            "run__output": str(tmp_path / "out"),
            "tracking__samples": {"count": 2},
        }
        return make_recipe(**{**basis, **changes})

    return settings


def weights(trainer: Trainer) -> dict[str, Tensor]:
    networks = {"generator": trainer.generator.module, "guidance": trainer.guidance.module}
    return {f"{k}.{n}": p.detach().clone() for k, network in networks.items() for n, p in network.named_parameters()}


def trained(settings: Recipe, steps: int = 3) -> tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]:
    trainer = build(settings, CPU)
    before = weights(trainer)
    return [trainer.train_step() for _ in range(steps)], before, weights(trainer)


@pytest.mark.bits
def test_who_learns_and_who_does_not(settings: Callable[..., Recipe]) -> None:
    """The generator and the fake score's LoRA change; the teacher does not, to the last bit."""
    trainer = build(settings(), CPU)
    family, guidance = trainer.family, trainer.guidance
    x, t = (
        torch.randn(3, *family.latent_shape(*family.size), generator=torch.Generator().manual_seed(0)),
        torch.full((3,), 0.6),
    )

    def teacher() -> Tensor:
        with torch.no_grad():
            return family.predict(guidance, x, t, family.condition([1, 2, 3]), lora_scale=0.0)

    first, before = teacher(), weights(trainer)
    with torch.no_grad():
        bare = family.predict(family.load_network().requires_grad_(False), x, t, family.condition([1, 2, 3]))
    assert torch.equal(first, bare)
    for _ in range(3):
        trainer.train_step()
    assert torch.equal(teacher(), first)
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {n for n in before if n.startswith("generator.") or ".lora_" in n}


def test_a_generator_lora_leaves_the_rest_alone(settings: Callable[..., Recipe]) -> None:
    lora = {"rank": 2, "alpha": 4, "targets": ["to_q", "fc1"]}
    _, before, after = trained(settings(model__generator_lora=lora), steps=1)
    moved = {n for n in before if n.startswith("generator.") and not torch.equal(before[n], after[n])}
    assert moved
    assert all(".lora_" in name for name in moved)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in moved} == {"to_q", "fc1"}


@pytest.mark.parametrize("stage", [2, 3], ids=["one network", "two networks"])
def test_the_start_values_of_both_loras_are_the_recipes(settings: Callable[..., Recipe], stage: int) -> None:
    """All of peft's lie within 1/√fan_in; a Gaussian of rank 1 has a standard deviation of 1."""
    plain = {"rank": 1, "alpha": 1, "targets": ["to_q", "to_v"]}
    for generator, fake_score in (("gaussian", "kaiming"), ("kaiming", "output_gaussian")):
        recipe = settings(
            model__generator_lora={**plain, "init": generator},
            model__fake_score_lora={**plain, "init": fake_score},
            optim__zero_stage=stage,
        )
        networks = make_networks(recipe, load_family(recipe), CPU)
        for network, init in zip(networks, (generator, fake_score), strict=True):
            starts = [p for name, p in network.named_parameters() if ".lora_A." in name]
            beyond = max((a.abs().max() * a.shape[1] ** 0.5).item() for a in starts)
            assert beyond > 2 if init != "kaiming" else beyond <= 1


def test_a_batch_may_be_accumulated(settings: Callable[..., Recipe]) -> None:
    """Batch 4 equals 4 x 1 and 2 x 2, to rounding."""
    whole, _, expected = trained(settings())
    for accumulation in (2, 4):
        logs, _, found = trained(settings(optim__accumulation=accumulation))
        for row, row_expected in zip(logs, whole, strict=True):
            assert row == pytest.approx(row_expected, rel=1e-4, abs=1e-7)
        for name in expected:
            # Adam turns the rounding of a gradient near 0 into a step of up to its learning rate, 1e-3.
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_average_is_what_is_sampled_and_saved(settings: Callable[..., Recipe], tmp_path: Path, stage: int) -> None:
    """Also where ZeRO-3 holds the weights in parts."""
    trainer = build(settings(optim__zero_stage=stage), CPU)
    network = trainer.generator
    average = Average(network, 0.5)
    start = full(network)
    trainer.train_step()
    average.update(8)  # at which the ramp has reached a half
    end = full(network)
    expected = {name: (start[name] + end[name]) / 2 for name in end}
    bare: Any = trainer.family.load_network()
    bare.load_state_dict(expected)
    x, t = (
        torch.randn(2, *trainer.family.latent_shape(*trainer.family.size), generator=torch.Generator().manual_seed(0)),
        torch.ones(2),
    )
    condition = trainer.family.condition([1, 2])
    with torch.no_grad(), average.applied():
        save_weights(tmp_path / "student.safetensors", average.shares())
        found = trainer.family.predict(network, x, t, condition)
    torch.testing.assert_close(load_file(tmp_path / "student.safetensors"), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, trainer.family.predict(bare, x, t, condition), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, end[name]) for name, value in full(network).items())


def full(network: Any) -> dict[str, Tensor]:
    parameters = dict(network.module.named_parameters())
    with gathered(parameters.values()):
        return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_agree(settings: Callable[..., Recipe], stage: int) -> None:
    expected, _, _ = trained(settings())
    found, _, _ = trained(settings(optim__zero_stage=stage))
    for row, row_expected in zip(found, expected, strict=True):
        assert row == pytest.approx(row_expected, rel=1e-4, abs=1e-7)


def test_gradient_checkpointing_changes_nothing(settings: Callable[..., Recipe]) -> None:
    expected, _, _ = trained(settings(), steps=2)
    found, _, _ = trained(settings(memory__gradient_checkpointing=["network", "vae"]), steps=2)
    for row, row_expected in zip(found, expected, strict=True):
        assert row == pytest.approx(row_expected, rel=1e-5, abs=1e-8)


@pytest.mark.bits
def test_the_same_seed_is_the_same_run(settings: Callable[..., Recipe]) -> None:
    first, again, other = trained(settings()), trained(settings()), trained(settings(run__seed=8))
    assert first[0] == again[0]
    assert all(torch.equal(first[2][name], again[2][name]) for name in first[2])
    assert first[0] != other[0]


def test_bf16_stays_near_fp32(settings: Callable[..., Recipe]) -> None:
    expected, _, _ = trained(settings(), steps=1)
    found, _, after = trained(settings(optim__precision="bf16"), steps=1)
    assert found[0]["loss/fake_score"] == pytest.approx(expected[0]["loss/fake_score"], rel=0.03)
    assert {w.dtype for w in after.values()} == {torch.bfloat16}


def test_data_classes_are_the_only_ones_asked_for(settings: Callable[..., Recipe]) -> None:
    trainer = build(settings(data__classes=[3, 8]), CPU)
    sample = trainer.rollouts.draw(Draws(7, ("generator", 0), range(20)), 0)
    assert set(sample.prompts) == {3, 8}


@pytest.mark.bits
def test_looking_on_changes_nothing(settings: Callable[..., Recipe], classifier: Path, tmp_path: Path) -> None:
    """Evaluation, samples and logging draw nothing that training draws, and nothing from torch's own generator."""
    evaluation = {"classifier": str(classifier), "reference": "shapes", "pictures": 100, "every": 1}
    busy = {
        "log_every": 1,
        "tensorboard": False,
        "samples": {"every": 1, "count": 2},
        "evaluation": {**evaluation, "teacher_steps": [2, 1]},
    }
    at_the_end = {**evaluation, "every": 0, "teacher_steps": []}
    quiet = {"log_every": 1, "tensorboard": False, "samples": {"count": 2}, "evaluation": at_the_end}
    metrics = {}
    for name, tracking in (("busy", busy), ("quiet", quiet)):
        made = settings(run__output=str(tmp_path / name), tracking=tracking, guidance__teacher_cfg=2.0)
        Run(made, build(made, CPU), None).carry_out()
        after = torch.get_rng_state()
        seed_others(made.run.seed, made.run.steps - 1, 0)
        assert torch.equal(torch.get_rng_state(), after)  # as the last step's seed left it
        metrics[name] = [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(tmp_path / name)]
    assert len(metrics["quiet"]) == 4
    assert metrics["busy"] == metrics["quiet"]
    rows = read_scores(tmp_path / "busy")
    assert [rows[f"teacher-{n}"].name for n in (2, 1)] == [
        "teacher, 2 steps, guidance 2", "teacher, 1 step, guidance 2",
    ]  # fmt: skip


def test_fp16_logs_what_was_skipped_and_the_scale(make_recipe: Callable[..., Recipe]) -> None:
    def engine(skipped: int, scale: float) -> SimpleNamespace:
        optimizer = SimpleNamespace(loss_scale=scale)
        rate, norm = (lambda: [1e-3]), (lambda: None)
        return SimpleNamespace(get_lr=rate, get_global_grad_norm=norm, skipped_steps=skipped, optimizer=optimizer)

    run = object.__new__(Run)
    run.settings = make_recipe(optim__precision="fp16")
    run.trainer = SimpleNamespace(generator=engine(2, 16384.0), guidance=engine(0, 65536.0))  # type: ignore[assignment]
    values = run._engine_values()
    assert (values["skipped/generator"], values["skipped/fake_score"]) == (2, 0)
    assert (values["loss_scale/generator"], values["loss_scale/fake_score"]) == (16384, 65536)


def test_a_dry_run_reaches_every_objective(settings: Callable[..., Recipe], tmp_path: Path) -> None:
    logs = runner.dry_run(settings())
    assert {"loss/fake_score", "loss/distribution_matching", "loss/refl", "reward/class-label"} <= logs.keys()
    assert list(tmp_path.iterdir()) == []
