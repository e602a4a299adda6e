"""Guidance weighted by the advantage of a reward without a gradient, on the toy family; formulas are written out."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from dmdr_core import randn
from dmdr_rewards import RewardInfo
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.objectives.advantage_matching import AdvantageMatching, AdvantageMatchingSection, advantages
from dmdr_train.planning.schedule import calls, stages
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.training.guide import Guide
from dmdr_train.training.picture_gradients import PictureGradients
from dmdr_train.training.sample import Sample
from torch import Tensor

KIND = "advantage_matching"
REWARD = {"name": "class-label", "checkpoint": "there"}
SCORES = [0.1, 0.5, 0.3, 2.0, 2.0, 2.0]


class Judge:
    """A reward that has no gradient and gives the scores that it is told."""

    info = RewardInfo("judge", "", (-9.0, 9.0), "", "", "text", False, None, "")

    def __init__(self, scores: Sequence[float] = SCORES, skipped: int | None = None) -> None:
        self.scores, self.skips = scores, skipped
        if skipped is not None:
            self.skipped = 0

    def score(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        assert not images.requires_grad
        if not self.scores:
            raise ConnectionError("nobody answers")
        if self.skips is not None:
            self.skipped += self.skips
        return torch.tensor(self.scores)


@pytest.fixture
def guide(toy_family: Any, toy_guidance: Any) -> Guide:
    return Guide(schema.Guidance(cfg=2.5), toy_family, toy_guidance)


def sample(family: Any) -> Sample:
    draws = Draws(7, ("generator", 3), range(6))
    x0 = randn((6, 1, 2, 2), draws.each("x0")).requires_grad_()
    prompts = [0, 0, 0, 2, 2, 2]
    t = torch.full((6,), 0.5)
    decode = PictureGradients(lambda made: made.x0 * 1.0)
    return Sample(
        x0, prompts, family.condition(prompts), draws, 3, x0.detach(), t, t * 0, [4, 4, 4, 5, 5, 5], decode,
        lambda s: s.x0,
    )  # fmt: skip


def objective(reward: Judge, **settings: Any) -> AdvantageMatching:
    section = AdvantageMatchingSection.model_validate({"kind": KIND, "reward": REWARD, **settings})
    return AdvantageMatching(section, KIND, reward)


def slope_of(found: AdvantageMatching, made: Sample, guide: Guide) -> tuple[Tensor, dict[str, float], Tensor]:
    loss, values = found(made, guide)
    (slope,) = torch.autograd.grad(loss, made.x0)
    return slope * made.x0.numel(), {name: float(value) for name, value in values.items()}, loss.detach()


def test_the_direction_by_hand(toy_family: Any, guide: Guide) -> None:
    made = sample(toy_family)
    found = objective(Judge(), matching={"normalise": "none"}, augmentation={"normalise": "none", "weight": 0.5})
    slope, values, _ = slope_of(found, made, guide)
    at, below = guide.renoise(made), found.renoise_below(made, guide)
    std = ((0.2**2 + 0.2**2) / 3) ** 0.5
    advantage = torch.tensor([-0.2 / std, 0.2 / std, 0.0, 0.0, 0.0, 0.0]).reshape(-1, 1, 1, 1)
    matching = guide.fake(made, at) - guide.conditional(made, at)
    augmentation = guide.conditional(made, below) - guide.unconditional(made, below)
    torch.testing.assert_close(slope, matching - 0.5 * advantage * 1.5 * augmentation)
    assert (values["reward/judge"], values[f"unscored/{KIND}"]) == (pytest.approx(6.9 / 6), 0.0)
    assert values[f"constant_groups/{KIND}"] == 0.5
    assert found.failure == ""


def test_the_pictures_of_other_objectives_keep_their_gradient(toy_family: Any, guide: Guide) -> None:
    made = sample(toy_family)
    objective(Judge())(made, guide)
    assert made.pictures.requires_grad


def test_a_picture_without_a_score_takes_no_part() -> None:
    score = torch.tensor([1.0, float("nan"), 3.0, float("nan"), float("nan"), float("nan")])
    found = advantages(score, ~score.isnan(), 3)
    assert found[1:2].tolist() + found[3:].tolist() == [0.0] * 4
    assert found[0] == -found[2] < 0


def test_pictures_that_are_left_out_are_no_failure(toy_family: Any, guide: Guide) -> None:
    found = objective(Judge([0.1, float("nan"), 0.3, 2.0, 2.0, 2.0], skipped=1))
    slope, values, loss = slope_of(found, sample(toy_family), guide)
    assert bool(slope.isfinite().all() & loss.isfinite())
    assert (values[f"unscored/{KIND}"], found.failure) == (pytest.approx(1 / 6), "")
    assert values["reward/judge"] == pytest.approx(6.4 / 5)


@pytest.mark.parametrize(
    ("scores", "failure"),
    [([], "judge of the objective advantage_matching: nobody answers"), ([*SCORES[:5], float("nan")], "")],
)
def test_a_reward_that_fails_spoils_the_update(
    toy_family: Any, guide: Guide, scores: list[float], failure: str
) -> None:
    found = objective(Judge(scores))
    slope, _, loss = slope_of(found, sample(toy_family), guide)
    assert loss.isnan()
    assert slope.isnan().all()
    assert found.failure == failure


# -- the recipe

OBJECTIVES = [{"kind": KIND, "cfg": 2.0, "reward": REWARD}]


def test_it_needs_groups(make_recipe_dict: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"^rollout.group_size: is 1 and advantage_matching compares the samples"):
        parse_recipe(make_recipe_dict(objectives=OBJECTIVES))


def test_its_pictures_are_decoded_without_a_gradient(make_recipe: Callable[..., schema.Recipe]) -> None:
    settings = make_recipe(objectives=OBJECTIVES, rollout={"group_size": 2})
    made = calls(settings, stages(settings)[0])
    assert (made.decodings, made.decoding_backwards, made.other_decodings) == (0, 0, 1)
    assert (made.predictions["teacher"], made.predictions["fake_score"]) == (3, 1)
    assert "past_margin/" not in " ".join(settings.watched)
    refl = {"kind": "refl", "reward": REWARD}
    both = make_recipe(objectives=[*OBJECTIVES, refl], rollout={"group_size": 2})
    made = calls(both, stages(both)[0])
    assert (made.decodings, made.decoding_backwards, made.other_decodings) == (1, 1, 1)
    assert [name for name in both.watched if name.startswith("past_margin/")] == ["past_margin/refl"]
