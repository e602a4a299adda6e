"""Steps that differ: a LoRA for each step of the rollout, and gradients through the steps before."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dmdr_core import rollout
from dmdr_models.networks.step_loras import StepLoRAs
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.recipe.schema import Recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.reporting.student_export import export_state_dict, export_student, load_student
from dmdr_train.run.build import build
from dmdr_train.training.trainer import Trainer
from safetensors.torch import save_file
from torch import Tensor

CPU = torch.device("cpu")


@pytest.fixture
def settings(make_recipe: Callable[..., Recipe], sd3: Path, prompts: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def settings(**changes: Any) -> Recipe:
        basis: dict[str, Any] = {
            "model": {
                "family": "sd3",
                "path": str(sd3),
                "max_tokens": 8,
                "generator_lora": {"rank": 2, "alpha": 4, "targets": ["attn.to_q", "attn.to_out.0"], "per_step": True},
                "fake_score_lora": {"rank": 2, "alpha": 2, "targets": ["attn.to_q"]},
            },
            "data__prompts": str(prompts),
            "rollout": {"steps": 2, "mode": "ode"},
            "guidance": {"ratio": 1, "cfg": 1.0},
            "run__output": str(tmp_path / "out"),
        }
        return make_recipe(**{**basis, **changes})

    return settings


def trainer_of(recipe: Recipe) -> Trainer:
    """A trainer whose LoRAs are as after some training: at the start B = 0, and A has no gradient."""
    trainer, generator = build(recipe, CPU), torch.Generator().manual_seed(3)
    for name, parameter in trainer.generator.module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    trainer.rollouts.generator = trainer.generator.module  # outside a step, the engine allows no backward pass
    return trainer


def steps_with_gradient(trainer: Trainer, loss: Tensor) -> set[str]:
    named = {n: p for n, p in trainer.generator.module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
    return {name.split(".")[-2] for name, g in zip(named, found, strict=True) if g is not None and g.abs().max() > 0}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("mode", ["ode", "sde"])
@pytest.mark.parametrize("through", [False, True])
def test_where_gradients_flow(settings: Callable[..., Recipe], through: bool, mode: str) -> None:
    """A sample trains the LoRA of its step; with `through`, one at the last step trains the first LoRA also."""
    trainer = trainer_of(settings(rollout={"steps": 2, "mode": mode, "through": through}))
    draws = Draws(1, ("generator", 0), range(4))
    sample = trainer.rollouts.draw(draws, 0)
    assert set(sample.positions) == {0, 1}
    assert not sample.x_t.requires_grad
    first, second = "generator_step_0", "generator_step_1"
    for row, position in enumerate(sample.positions):
        expected = {first} if position == 0 else ({first, second} if through else {second})
        assert steps_with_gradient(trainer, sample.x0[row].square().sum()) == expected
    part = trainer.rollouts.draw(Draws(1, ("generator", 0), range(2, 4)), 0)  # of another process
    torch.testing.assert_close(part.x0, sample.x0[2:], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        other = trainer.rollouts.draw_for_fake_score(draws, 0)
    assert not other.x0.requires_grad


@pytest.mark.usefixtures("one_process")
def test_the_gradient_through_both_steps_is_that_of_the_whole_rollout(settings: Callable[..., Recipe]) -> None:
    trainer = trainer_of(settings(rollout={"steps": 2, "mode": "ode", "through": True}))
    made, draws = trainer.rollouts, Draws(1, ("generator", 0), range(3))
    sample = made.draw(draws, 0, {"final_sample"})
    start = made.start(draws)
    network = trainer.generator.module
    whole = rollout(
        lambda x, t: made.family.predict(network, x, t, sample.condition),
        made.family.process,
        made.grid,
        start.noise,
        "ode",
    )
    torch.testing.assert_close(sample.x0, whole.x0, atol=1e-5, rtol=1e-4)
    parameters = [p for p in network.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(x0.square().sum(), parameters, allow_unused=True) for x0 in (sample.x0, whole.x0)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("one_process")
def test_a_step_trains_both_and_the_student_has_both(settings: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = settings(rollout={"steps": 2, "mode": "ode", "through": True})
    trainer = build(recipe, CPU)
    network = trainer.generator.module
    assert isinstance(network, StepLoRAs)
    assert network.base is trainer.guidance.module.base
    before = {name: p.clone() for name, p in network.named_parameters()}
    trainer.train_step()
    changed = {name.split(".")[-2] for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"generator_step_0", "generator_step_1"}
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    save_file(weights, tmp_path / "student.safetensors")
    _, loaded = load_student(recipe, tmp_path)
    assert isinstance(loaded, StepLoRAs)
    export_student(tmp_path / "student", recipe, tmp_path)
    for step, lora in enumerate(loaded.steps):
        saved = trainer.family.read_lora(tmp_path / f"student/step-{step}")
        for layer, (a, b) in lora.factors.items():
            torch.testing.assert_close(saved.changes[layer].a, weights[a])
            torch.testing.assert_close(saved.changes[layer].b, weights[b] * 2)  # alpha / rank
    assert '"lora_per_step": true' in (tmp_path / "student/dmdr.json").read_text()
    assert "callback_on_step_end=switch" in (tmp_path / "student/README.md").read_text()
    with pytest.raises(UserError, match=r"--output: the student has a LoRA for each step"):
        export_state_dict(tmp_path / "student.bin", recipe, tmp_path)


def test_the_work_of_a_step(settings: Callable[..., Recipe]) -> None:
    plain, through = (predictions(settings(rollout={"steps": 2, "through": on})) for on in (False, True))
    assert through["generator trained"] - plain["generator trained"] == 0.5
    assert through["generator"] - plain["generator"] == -0.5


LORA = {"rank": 2, "per_step": True}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rollout": {"steps": 1}}, "per_step: true has no effect with rollout.steps 1"),
    ({"optim__zero_stage": 1}, "per_step: true does not go with optim.zero_stage 1"),
    ({"optim__zero_stage": 3}, "per_step: true does not go with optim.zero_stage 3"),
    ({"memory__compile": True}, "per_step: true does not go with memory.compile"),
    ({"memory__quantize": "int8"}, "per_step: true does not go with memory.quantize"),
    ({"memory__shared_backbone": False}, "per_step: true does not go with memory.shared_backbone: false"),
    ({"run__init_from": "a"}, "per_step: true does not go with run.init_from"),
    ({"guidance": {"alignment": {}}}, "per_step: true does not go with guidance.alignment"),
    ({"model__generator": "a"}, "per_step: true does not go with a model.generator of its own"),
    ({"model__teacher_loras": [{"path": "a"}]}, "per_step: true does not go with model.teacher_loras"),
    ({"model__generator_lora": {**LORA, "start": "a"}}, "per_step: true does not go with model.generator_lora.start"),
    ({"rollout": {"steps": 1, "through": True}, "model__generator_lora": None}, "through: true has no effect with"),
    ({"rollout": {"steps": 2, "through": True, "states": "authors"}}, "through: true does not go with rollout.states"),
    ({"rollout": {"steps": 2, "through": True, "reuse": "states"}}, "through: true does not go with rollout.reuse"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_go_together(settings: Callable[..., Recipe], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(**changes)
