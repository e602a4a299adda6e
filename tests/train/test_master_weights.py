"""What outlives a run in half precision is what the optimizer holds, in float32, and not the network's own rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.compatibility import check_moments
from dmdr_train.checkpoint.load import load_checkpoint
from dmdr_train.checkpoint.save import Saving
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.deepspeed_internals import gathered
from dmdr_train.distributed.master_weights import masters
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.student_export import export_student
from dmdr_train.run.build import build
from dmdr_train.training.networks import make_networks
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")
LORA = {"rank": 2, "alpha": 2}
STAGES = [(0, None), (1, LORA), (2, None), (3, LORA)]


@pytest.fixture
def settings(make_recipe: Callable[..., Recipe], model: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The generator's steps are far smaller than the distance of two numbers in bf16."""

    def settings(stage: int, lora: Any, **changes: Any) -> Recipe:
        basis: dict[str, Any] = {"model__path": str(model), "model__generator_lora": lora, "guidance__ratio": 1}
        optim = {"generator": {"lr": 1e-6}, "fake_score": {"lr": 1e-2}, "precision": "bf16", "zero_stage": stage}
        return make_recipe(**basis, optim={"batch_size": 2, **optim}, run__output=str(tmp_path / "run"), **changes)

    return settings


def exact(engine: Any) -> dict[str, Tensor]:
    return {name: share.whole().clone() for name, share in masters(engine).items()}


def rounded(engine: Any) -> dict[str, Tensor]:
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    with gathered(trained.values()):
        return {name: p.detach().clone() for name, p in trained.items()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def moved(found: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """The share of the entries of the attention's and the feed-forward's weights that differ."""
    names = [name for name in start if ".attn." in name or ".mlp." in name]
    assert names
    return (torch.cat([(found[n] != start[n]).flatten() for n in names]).float().mean()).item()


@pytest.mark.parametrize(("stage", "lora"), STAGES, ids=lambda value: "lora" if value else str(value))
def test_a_stage_begins_where_the_last_ended(
    settings: Callable[..., Recipe], tmp_path: Path, stage: int, lora: Any
) -> None:
    recipe = settings(stage, lora)
    trainer = build(recipe, CPU)
    start, start_rounded = exact(trainer.generator), rounded(trainer.generator)
    for _ in range(3):
        trainer.train_step()
    end = {"generator": exact(trainer.generator), "guidance": exact(trainer.guidance)}
    assert moved(end["generator"], start) > (0.9 if lora is None else 0.45)  # of a LoRA, B moves first
    if lora is None:
        assert moved(rounded(trainer.generator), start_rounded) < 0.5, "the rounded weights would do as well"
    path = Saving(tmp_path, recipe, trainer, Average(trainer.generator, None)).finish()
    for file, name in (("generator", "generator"), ("student", "generator"), ("fake_score", "guidance")):
        assert equal(load_file(path / f"{file}.safetensors"), end[name]), file
    other = build(settings(stage, lora, run__init_from=str(path), run__seed=99), CPU)
    assert equal(exact(other.generator), end["generator"])
    assert equal(exact(other.guidance), end["guidance"])
    for engine in (other.generator, other.guidance):
        assert equal(rounded(engine), {name: tensor.bfloat16() for name, tensor in exact(engine).items()})
    if lora is None:
        export_student(tmp_path / "student", recipe, path)
        student = dmdr_models.load("sit", tmp_path / "student").load_network()
        assert equal(dict(student.named_parameters()), end["generator"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_begins_at_the_weights_of_the_file(settings: Callable[..., Recipe], stage: int) -> None:
    trainer = build(settings(stage, None), CPU)
    network = trainer.family.load_network(dtype=torch.float32)
    assert equal(exact(trainer.generator), dict(network.named_parameters()))


@pytest.mark.bits
@pytest.mark.parametrize(("stage", "lora"), [(2, LORA), (3, None)], ids=["2", "3"])
def test_the_average_is_that_of_the_master_weights(
    settings: Callable[..., Recipe], tmp_path: Path, stage: int, lora: Any
) -> None:
    recipe = settings(stage, lora, optim__ema=0.5)
    trainer = build(recipe, CPU)
    average, expected = Average(trainer.generator, 0.5), exact(trainer.generator)
    for _ in range(2):
        trainer.train_step()
        average.update(100)  # long after the ramp
        expected = {name: 0.5 * tensor + 0.5 * exact(trainer.generator)[name] for name, tensor in expected.items()}
    path = Saving(tmp_path, recipe, trainer, average).finish()
    student = load_file(path / "student.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(student[name], tensor, rtol=0, atol=1e-8)
    before = rounded(trainer.generator)
    with average.applied():
        assert equal(rounded(trainer.generator), {name: tensor.bfloat16() for name, tensor in student.items()})
    assert equal(rounded(trainer.generator), before)
    again = build(recipe, CPU)
    resumed = Average(again.generator, 0.5)
    load_checkpoint(path, again, resumed)
    assert equal(resumed.state, average.state)
    for each in (trainer, again):
        each.train_step()
    assert equal(exact(again.generator), exact(trainer.generator)), "a resumed run is another"


def test_a_lora_of_a_text_model_is_exported_in_float32(
    make_recipe: Callable[..., Recipe], sd3: Path, prompts: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        model={"family": "sd3", "path": str(sd3), "generator_lora": LORA, "fake_score_lora": LORA, "max_tokens": 8},
        data__prompts=str(prompts),
        optim__precision="bf16",
    )
    trainer = build(recipe, CPU)
    trainer.train_step()
    path = Saving(tmp_path, recipe, trainer, Average(trainer.generator, None)).finish()
    export_student(tmp_path / "student", recipe, path)
    exported = load_file(tmp_path / "student/adapter_model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    expected = {name.replace(".generator.", "."): t for name, t in exact(trainer.generator).items()}
    assert equal({n.replace("base_model.model.", "network."): t for n, t in exported.items()}, expected)
    networks = make_networks(recipe, trainer.family, CPU)
    assert {p.dtype for p in networks.generator.base.parameters()} == {torch.bfloat16, torch.float32}


def state(engine: Any) -> list[Tensor]:
    """Moments and counters of AdamW, inside DeepSpeed's wrapper or bare."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [value for values in inner.state.values() for value in values.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_moments_may_come_along(settings: Callable[..., Recipe], tmp_path: Path, stage: int) -> None:
    recipe = settings(stage, None)
    trainer = build(recipe, CPU)
    for _ in range(2):
        trainer.train_step()
    path = Saving(tmp_path, recipe, trainer, Average(trainer.generator, None)).finish()
    changes = {"optim__generator": {"lr": 3e-4, "betas": (0.5, 0.7), "warmup": 1}, "run__init_from": str(path)}
    for moments in (True, False):
        other = build(settings(stage, None, **changes, run__init_moments=moments), CPU)
        assert equal(exact(other.generator), exact(trainer.generator))
        for ours, theirs in ((other.generator, trainer.generator), (other.guidance, trainer.guidance)):
            same = [torch.equal(a, b) for a, b in zip(state(ours), state(theirs), strict=bool(moments))]
            assert len(same) > 2 if moments else not same or not all(same)
            assert all(same) or not moments
            assert ours.lr_scheduler.last_epoch == ours.global_steps == 0
        (group,) = other.generator.optimizer.param_groups
        assert (group["lr"], group["betas"]) == (1.5e-4, (0.5, 0.7))
    other.train_step()
    assert other.generator.get_lr() == [3e-4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__precision": "fp32"}, "optim.precision bf16 and this run fp32"),
        ({"optim__zero_stage": 1}, "optim.zero_stage 2 and this run 1"),
        ({"optim__eight_bit": True}, "optim.eight_bit False and this run True"),
    ],
)
def test_moments_of_another_optimizer_are_refused(
    settings: Callable[..., Recipe], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(settings(2, LORA)))
    check_moments(settings(2, LORA), tmp_path)
    with pytest.raises(UserError, match=rf"^run.init_moments: .* has {message}; use the same, or init_moments: false$"):
        check_moments(settings(2, LORA, **changes), tmp_path)
