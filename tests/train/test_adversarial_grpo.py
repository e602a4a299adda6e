"""The policy gradient whose reward is the discriminator: by hand on the toy family, and in a run of a tiny SiT."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.data.prompt_order import ClassLabels
from dmdr_train.objectives.adversarial import AdversarialGRPO, AdversarialGRPOSection
from dmdr_train.planning.schedule import calls, stages
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.run.build import build
from dmdr_train.training.rollouts import Rollouts
from dmdr_train.training.sample import Sample
from torch import Tensor

DRAWS = Draws(7, ("generator", 8), range(16))
MATCHING = {"kind": "distribution_matching"}


@pytest.fixture
def make_rollouts(make_recipe: Callable[..., Any], toy_family: Any, toy_generator: Any) -> Callable[..., Rollouts]:
    def make(**changes: Any) -> Rollouts:
        settings = schema.Rollout(**{"steps": 4, "mode": "sde", "shift": 3.0, "group_size": 4, **changes})
        recipe = make_recipe().model_copy(update={"rollout": settings})
        return Rollouts(recipe, toy_family, toy_generator, ClassLabels([0, 1, 2]), None, torch.device("cpu"))

    return make


def judge(x: Tensor, t: Tensor, condition: Any) -> Tensor:
    """A logit that is different at every time, so that only states of one time can be compared."""
    return x.flatten(1).square().sum(dim=1) + 100 * t


def guide_with(family: Any, logit: Any = judge) -> Any:
    return SimpleNamespace(family=family, discriminator=SimpleNamespace(logit=logit))


def objective(**settings: Any) -> AdversarialGRPO:
    return AdversarialGRPO(AdversarialGRPOSection(kind="adversarial_grpo", **settings), "adversarial_grpo")


def normalised(values: Tensor) -> Tensor:
    groups = values.reshape(4, 4)
    return ((groups - groups.mean(dim=1, keepdim=True)) / groups.std(dim=1, correction=0, keepdim=True)).flatten()


@pytest.mark.parametrize("settings", [{}, {"state": 0.5, "final": 2.0}, {"state": 0.0}, {"final": 0.0}, {"steps": 1}])
def test_by_hand(make_rollouts: Callable[..., Rollouts], toy_family: Any, settings: dict[str, Any]) -> None:
    """Per sample −A / B / D · (x_s − mean) / std² · ∂mean/∂x0, in which mean = (1 − s) x0 and std = s."""
    term = objective(**settings)
    made = make_rollouts().draw(DRAWS, 0, term.needs)
    loss, values = term(made, guide_with(toy_family))
    states = judge(made.next_state, made.t_next, None)
    ends = judge(made.final_x0, torch.zeros(16), None)
    advantage = settings.get("state", 1.0) * normalised(states) + settings.get("final", 1.0) * normalised(ends)
    expected = torch.zeros_like(made.x0)
    for i, position in enumerate(made.positions):
        if position < settings.get("steps", 3):
            s, x0 = made.t_next[i], made.x0[i].detach()
            expected[i] = -advantage[i] / 16 / 4 * (made.next_state[i] - (1 - s) * x0) / s**2 * (1 - s)
    (found,) = torch.autograd.grad(loss, made.x0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert expected.any()
    logged = {"state": states.mean(), "final": ends.mean()}
    for name, mean in logged.items():
        if settings.get(name, 1.0):
            assert float(values[f"logit_{name}/adversarial_grpo"]) == pytest.approx(mean.item(), rel=1e-4)


@pytest.mark.parametrize("positions", ["independent", "stratified"])
@pytest.mark.parametrize("reuse", ["none", "states"])
def test_a_group_is_at_one_step(make_rollouts: Callable[..., Rollouts], positions: str, reuse: str) -> None:
    """Over many groups all steps come; with other objectives a group's samples are at different steps."""
    rollouts, seen = make_rollouts(positions=positions, reuse=reuse), []
    for update in range(20):
        made = rollouts.draw(Draws(7, ("generator", update), range(16)), update, {"groups", "group_positions"})
        groups = torch.tensor(made.positions).reshape(4, 4)
        assert (groups == groups[:, :1]).all()
        assert torch.equal(made.t, rollouts.grid.times[made.positions])
        seen += groups[:, 0].tolist()
    assert set(seen) == {0, 1, 2, 3}
    apart = torch.tensor(rollouts.draw(DRAWS, 99, {"groups"}).positions).reshape(4, 4)
    assert (apart != apart[:, :1]).any()


def test_a_split_batch_has_the_same_positions(make_rollouts: Callable[..., Rollouts]) -> None:
    rollouts, needs = make_rollouts(), objective().needs
    parts = [rollouts.draw(Draws(7, ("generator", 8), range(first, first + 4)), 0, needs) for first in range(0, 16, 4)]
    assert [p for part in parts for p in part.positions] == list(rollouts.draw(DRAWS, 0, needs).positions)


def test_logits_that_are_not_finite_make_no_update(make_rollouts: Callable[..., Rollouts], toy_family: Any) -> None:
    term = objective()
    made = make_rollouts().draw(DRAWS, 0, term.needs)
    loss, _ = term(made, guide_with(toy_family, lambda x, t, c: torch.full((16,), torch.nan)))
    assert loss.isnan()


# -- in a run


@pytest.fixture
def recipe_of(make_recipe_dict: Callable[..., dict[str, Any]], model: Any) -> Callable[..., dict[str, Any]]:
    def recipe_of(**changes: Any) -> dict[str, Any]:
        term = {"kind": "adversarial_grpo", **changes.pop("objective", {})}
        rollout = {"steps": 2, "group_size": 2, **changes.pop("rollout", {})}
        guidance = {"ratio": 1, "discriminator": {"teacher_steps": 2, "width": 8}, **changes.pop("guidance", {})}
        return make_recipe_dict(
            model__path=str(model), objectives=[MATCHING, term], rollout=rollout, guidance=guidance, **changes
        )

    return recipe_of


@pytest.mark.usefixtures("one_process")
def test_it_trains_the_generator_and_leaves_the_head_to_its_own_loss(recipe_of: Callable[..., dict[str, Any]]) -> None:
    """The weight of the objective changes the generator, and nothing that the head learns from the same samples."""
    grpo = build(parse_recipe(recipe_of()), torch.device("cpu"))
    heavy = build(parse_recipe(recipe_of(objective={"weight": 1000.0})), torch.device("cpu"))
    rows = [trainer.train_step() for trainer in (grpo, heavy)]
    assert {"logit_state/adversarial_grpo", "logit_final/adversarial_grpo", "loss/discriminator"} <= rows[0].keys()
    heads = [trainer.guide.discriminator.head.state_dict() for trainer in (grpo, heavy)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    weights = [[p.clone() for p in trainer.generator.module.parameters()] for trainer in (grpo, heavy)]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))  # a new head has no opinion
    for _ in range(4):
        for trainer in (grpo, heavy):
            trainer.train_step()
    weights = [list(trainer.generator.module.parameters()) for trainer in (grpo, heavy)]
    assert any(not torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": {"mode": "ode"}}, "rollout.mode: ode draws no noise between steps, and adversarial_grpo trains"),
        ({"rollout": {"steps": 1}}, "rollout.steps: 1 draws no noise between steps, and adversarial_grpo trains"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size: is 1 and adversarial_grpo compares the samples"),
        ({"rollout": {"through": True}}, "rollout.through: true does not go with adversarial_grpo, which takes"),
        ({"guidance": {"discriminator": None}}, "guidance.discriminator: is null and adversarial_grpo needs it"),
        ({"objective": {"state": 0.0, "final": 0.0}}, "objectives.1.state: is 0 as final is, so there is no reward"),
        ({"objective": {"reward": {"name": "clip"}}}, "objectives.1.reward: unknown key"),
        ({"objective": {"steps": 2}}, "objectives.1.steps: 2 is more than the 1 steps that draw noise"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    recipe_of: Callable[..., dict[str, Any]], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(recipe_of(**changes))
    assert str(refused.value).startswith(said)


def test_its_stage_is_that_of_a_reward(recipe_of: Callable[..., dict[str, Any]]) -> None:
    recipe = parse_recipe(recipe_of(objective={"start": 5}))
    assert recipe.stages == {"cold_start": 5, "joint": 10}
    assert recipe.first_reward == 5


def test_its_work_is_counted(recipe_of: Callable[..., dict[str, Any]]) -> None:
    """The rollout goes on to its end, half a prediction on average; the head sees two states; nothing is decoded."""
    found: Recipe = parse_recipe(recipe_of())
    plain = parse_recipe({**recipe_of(), "objectives": [MATCHING], "rollout": {"steps": 2}, "guidance": {"ratio": 1}})
    asked, before = predictions(found), predictions(plain)
    assert asked["generator"] == before["generator"] + 0.5
    assert asked["teacher"] == before["teacher"] + 2 + 2 + 2  # drawing real samples, the head's two, the reward's two
    (stage,) = stages(found)
    made = calls(found, stage)
    assert (made.decodings, made.decoding_backwards, made.other_decodings) == (0, 0, 0)


def test_rewards_are_those_of_the_first_update(make_rollouts: Callable[..., Rollouts], toy_family: Any) -> None:
    term = objective()
    made: Sample = make_rollouts().draw(DRAWS, 0, term.needs)
    first, _ = term(made, guide_with(toy_family))
    again, _ = term(made, guide_with(toy_family, lambda x, t, c: -judge(x, t, c)))
    assert torch.equal(first, again)
