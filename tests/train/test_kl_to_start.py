"""The KL divergence to the generator as it was when the objective began; formulas are written out by hand."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.checkpoint.load import load_checkpoint
from dmdr_train.checkpoint.save import Saving
from dmdr_train.data.prompt_order import ClassLabels
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.frozen_weights import copy_weights, with_weights
from dmdr_train.distributed.master_weights import masters
from dmdr_train.objectives.kl_to_start import KLToStart, KLToStartSection
from dmdr_train.planning.costs import costs_of
from dmdr_train.planning.memory import memory
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.run.build import build
from dmdr_train.training.rollouts import Rollouts
from dmdr_train.training.sample import Sample
from dmdr_train.training.trainer import Trainer
from torch import Tensor

CPU = torch.device("cpu")
DRAWS = Draws(7, ("generator", 5), range(8))
NO_GUIDE: Any = None
KL = {"kind": "kl_to_start", "start": 1, "weight": 0.5}
MATCHING = {"kind": "distribution_matching", "stop": 2}
LORA = {"rank": 2, "alpha": 4}
START = torch.tensor([0.1, 0.5, -0.2, 0.3])


# -- the loss


@pytest.fixture
def make_sample(make_recipe: Callable[..., Any], toy_family: Any, toy_generator: Any) -> Callable[..., Sample]:
    def make(**changes: Any) -> Sample:
        recipe = make_recipe().model_copy(update={"rollout": schema.Rollout(**{"steps": 4, "shift": 3.0, **changes})})
        made = Rollouts(recipe, toy_family, toy_generator, ClassLabels([0, 1, 2]), lambda sample: sample.x0, CPU)
        return made.draw(DRAWS, 0)

    return make


def factor(mode: str, t: float, s: float, last: bool) -> float:
    """What (x0 − x0_ref)² is multiplied by in the divergence of one dimension."""
    if last or mode == "ode":
        return 0.5
    turn = {"sde": 1.0, "cps": 0.4}[mode] * math.pi / 2
    signal = (1 - s) - s * math.cos(turn) * (1 - t) / t
    return signal**2 / (2 * (s * math.sin(turn)) ** 2)


@pytest.mark.parametrize("mode", ["sde", "cps", "ode"])
def test_the_divergence_by_hand(mode: str, make_sample: Callable[..., Sample], toy_generator: Any) -> None:
    made = make_sample(mode=mode, **({"eta": 0.4} if mode == "cps" else {}))
    objective = KLToStart(KLToStartSection(kind="kl_to_start"), "kl_to_start")
    now = toy_generator.base.data.clone()
    toy_generator.base.data.copy_(START)
    objective.begin(toy_generator)
    toy_generator.base.data.copy_(now)
    loss, _ = objective(made, NO_GUIDE)
    expected, slopes = torch.zeros(()), []
    for i in range(8):
        x, t, label = made.x_t[i], made.t[i], made.prompts[i] + 1
        reference = x - t * (START[0] * x + START[1] * torch.sin(3 * x) + START[2] * t + START[3] * label)
        change = made.x0[i].detach() - reference
        scale = factor(mode, float(t), float(made.t_next[i]), made.positions[i] == 3)
        expected += scale * change.square().mean() / 8
        slopes.append(scale * 2 * change / change.numel() / 8)
    assert 3 in made.positions
    assert min(made.positions) < 3
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    (found,) = torch.autograd.grad(loss, made.x0)
    torch.testing.assert_close(found, torch.stack(slopes), rtol=1e-4, atol=1e-6)


def test_where_nothing_has_moved_there_is_no_divergence(make_sample: Callable[..., Sample], toy_generator: Any) -> None:
    objective = KLToStart(KLToStartSection(kind="kl_to_start"), "kl_to_start")
    objective.begin(toy_generator)
    made = make_sample(mode="sde")
    loss, _ = objective(made, NO_GUIDE)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, made.x0)[0].abs().max() == 0


def test_the_graph_of_the_sample_keeps_its_own_weights(make_sample: Callable[..., Sample], toy_generator: Any) -> None:
    """The reference predicts between the sample's forward pass and its backward pass."""
    made = make_sample()
    alone = torch.autograd.grad(made.x0.square().sum(), toy_generator.base, retain_graph=True)[0]
    before = toy_generator.base.data.clone()
    other = made.x0_with({"base": START})
    assert not other.requires_grad
    assert not torch.allclose(other, made.x0)
    assert torch.equal(toy_generator.base.data, before)
    torch.testing.assert_close(torch.autograd.grad(made.x0.square().sum(), toy_generator.base)[0], alone)


def test_the_own_weights_come_back_after_an_error(toy_generator: Any) -> None:
    before = toy_generator.base.data.clone()
    with pytest.raises(RuntimeError), with_weights(toy_generator, {"base": START}):
        toy_generator(torch.ones(2, 3), torch.ones(5), torch.ones(7))  # shapes that do not fit
    assert torch.equal(toy_generator.base.data, before)


# -- in a run


@pytest.fixture
def make_trainer(make_recipe: Callable[..., Any], model: Path, one_process: None) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        basis: dict[str, Any] = {"model__path": str(model), "objectives": [MATCHING, KL], "guidance": {"ratio": 1}}
        return build(make_recipe(**{**basis, "rollout": {"steps": 2}, "run__steps": 4, **changes}), CPU)

    return make


def kept(trainer: Trainer) -> dict[str, Tensor]:
    return trainer.objectives[1].state_dict()


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: share.whole().clone() for name, share in masters(trainer.generator).items()}


@pytest.mark.parametrize("changes", [{}, {"model__generator_lora": LORA, "optim__zero_stage": 2}])
def test_a_resumed_run_has_the_reference_of_an_uninterrupted_one(
    changes: dict[str, Any], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer(**changes)
    assert "loss/kl_to_start" not in trainer.train_step()
    assert kept(trainer) == {}
    begun = copy_weights(trainer.generator)
    assert trainer.train_step()["loss/kl_to_start"] == 0.0
    path = Saving(tmp_path, trainer.settings, trainer, Average(trainer.generator, None)).finish()
    again = make_trainer(**changes)
    load_checkpoint(path, again, Average(again.generator, None))
    logs = [each.train_step() for each in (trainer, again)]
    assert logs[0]["loss/kl_to_start"] == logs[1]["loss/kl_to_start"] > 0
    assert "loss/fake_score" not in logs[0]
    for each in (trainer, again):
        assert kept(each).keys() == begun.keys() == weights(each).keys()
        assert all(torch.equal(value, begun[name]) for name, value in kept(each).items())
        assert not any(torch.equal(value, begun[name]) for name, value in weights(each).items())
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(trainer).items())


def test_it_leads_back_to_the_start(make_trainer: Callable[..., Trainer]) -> None:
    """A step along its gradient brings the prediction nearer to the reference."""
    trainer = make_trainer(optim__generator__lr=1e-4)
    for _ in range(2):
        trainer.train_step()
    (draws,) = trainer.micro_batches("generator", 2)
    before = trainer.rollouts.draw(draws, 2)
    loss, _ = trainer.objectives[1](before, trainer.guide)
    trainer.train_step()
    after = replace(before, x0=before.x0_with(copy_weights(trainer.generator)))
    assert trainer.objectives[1](after, trainer.guide)[0] < loss


# -- recipes


def test_it_costs_one_prediction_and_one_copy(make_recipe: Callable[..., Any], model: Path) -> None:
    def made(*objectives: dict[str, Any]) -> Any:
        return make_recipe(model__path=str(model), objectives=[{"kind": "distribution_matching"}, *objectives])

    plain, more = made(), made(KL)
    assert predictions(more) == predictions(plain) | {"generator": predictions(plain)["generator"] + 1}
    costs = costs_of(plain)
    copy = memory(more, costs, 1).parts["frozen copies"]
    assert copy == 4 * costs.roles["generator"].trained
    assert memory(more, costs, 1).total == memory(plain, costs, 1).total + copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": [{**KL, "start": 0}]}, "objectives.0.kind: kl_to_start alone leaves the student as it is; add"),
        ({"optim__zero_stage": 3}, "optim.zero_stage: 3 splits the weights that kl_to_start keeps a copy of; use 2"),
        ({"objectives": [MATCHING, {**KL, "weight": "auto"}]}, "objectives.1.weight: "),
    ],
)
def test_what_cannot_be_is_refused(
    make_recipe_dict: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(make_recipe_dict(**{"objectives": [MATCHING, KL], **changes}))
    assert str(refused.value).startswith(message)
