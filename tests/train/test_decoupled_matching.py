"""Decoupled distribution matching as an objective, on the toy family; formulas are written out by hand."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from dmdr_core import FlowMatching, VariancePreserving, randn
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.objectives.decoupled_matching import DecoupledMatching, DecoupledMatchingSection
from dmdr_train.objectives.distribution_matching import DistributionMatching, DistributionMatchingSection
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.training.guide import Guide
from dmdr_train.training.sample import Sample
from torch import Tensor

KIND = "decoupled_matching"


def sample(family: Any, samples: Sequence[int] = range(6), time: float = 0.5) -> Sample:
    draws = Draws(7, ("generator", 3), samples)
    x0 = randn((len(samples), 1, 2, 2), draws.each("x0")).requires_grad_()
    prompts, t = [index % 3 for index in samples], torch.full((len(samples),), time)
    return Sample(
        x0, prompts, family.condition(prompts), draws, 3, x0.detach(), t, t * 0, [0] * len(samples),
        lambda s: s.x0 * 1.0, lambda s: s.x0,
    )  # fmt: skip


def objective(**settings: Any) -> DecoupledMatching:
    return DecoupledMatching(DecoupledMatchingSection(kind=KIND, **settings), KIND)


def distance(x0: Tensor, other: Tensor) -> Tensor:
    return (x0 - other).abs().flatten(1).mean(dim=1).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("normalise", ["teacher", "none"])
def test_the_direction_by_hand(toy_family: Any, toy_guidance: Any, normalise: str) -> None:
    guide, made = Guide(schema.Guidance(cfg=2.5), toy_family, toy_guidance), sample(toy_family)
    matching, augmentation = {"weight": 0.5, "normalise": normalise}, {"weight": 3.0, "normalise": normalise}
    found = objective(matching=matching, augmentation=augmentation)
    loss, values = found(made, guide)
    (slope,) = torch.autograd.grad(loss, made.x0)

    at, below = guide.renoise(made), found.renoise_below(made, guide)
    x0 = made.x0.detach()
    fake, cond = guide.fake(made, at), guide.conditional(made, at)
    ca_cond, ca_uncond = guide.conditional(made, below), guide.unconditional(made, below)
    n, m = (distance(x0, cond), distance(x0, ca_cond)) if normalise == "teacher" else (1.0, 1.0)
    expected = 0.5 * (fake - cond) / n - 3.0 * 1.5 * (ca_cond - ca_uncond) / m
    torch.testing.assert_close(slope, expected / x0.numel())
    torch.testing.assert_close(loss, 0.5 * expected.square().mean())
    assert {name: float(value) for name, value in values.items()} == {"teacher_scale": 0.0, f"silenced/{KIND}": 0.0}
    assert not torch.equal(at.noise, below.noise)


@pytest.mark.parametrize("process", [FlowMatching(), VariancePreserving(torch.linspace(0.99, 0.01, 1000))])
def test_augmentation_is_cleaner_than_the_generator_and_matching_is_not(toy_family: Any, process: Any) -> None:
    toy_family.process = process
    guide, made = Guide(schema.Guidance(cfg=2.0), toy_family, None), sample(toy_family, range(200), 0.3)
    if isinstance(process, VariancePreserving):
        made = sample_with(made, torch.full((200,), 300))
    below, at = objective().renoise_below(made, guide), guide.renoise(made)
    assert bool((below.t < made.t).all())
    assert below.t.max() > 0.9 * made.t.max()  # over the whole range
    assert below.t.min() < 0.1 * made.t.max()
    assert at.t.max() > 3 * made.t.max()
    torch.testing.assert_close(below.x_t, process.add_noise(made.x0.detach(), below.noise, below.t))


def sample_with(made: Sample, t: Tensor) -> Sample:
    from dataclasses import replace

    return replace(made, t=t)


def test_each_term_has_a_sampler_of_its_own(toy_family: Any) -> None:
    guide, made = Guide(schema.Guidance(cfg=2.0), toy_family, None), sample(toy_family, range(200), 0.8)
    high, low = {"renoise": {"alpha": 20.0, "beta": 2.0}}, {"renoise": {"alpha": 2.0, "beta": 20.0}}
    found = objective(matching=high, augmentation=low)
    assert guide.renoise(made, found.matching_times).t.mean() == pytest.approx(10 / 11, abs=0.02)
    assert found.renoise_below(made, guide).t.mean() == pytest.approx(0.8 / 11, abs=0.02)
    assert guide.renoise(made).t.mean() == pytest.approx(0.5, abs=0.05)


def test_draws_do_not_depend_on_how_the_batch_is_split(toy_family: Any, toy_guidance: Any) -> None:
    guide = Guide(schema.Guidance(cfg=2.0), toy_family, toy_guidance)

    def slopes(samples: Sequence[int]) -> Tensor:
        made = sample(toy_family, samples)
        (slope,) = torch.autograd.grad(objective()(made, guide)[0], made.x0)
        return slope * len(samples)

    torch.testing.assert_close(slopes(range(6)), torch.cat([slopes(range(2)), slopes(range(2, 6))]))


def test_a_given_scale_takes_the_place_of_the_recipes(toy_family: Any, toy_guidance: Any) -> None:
    """The scale enters the augmentation alone: 1 + 2 (w − 1) with half the weight is the same."""
    guide, made = Guide(schema.Guidance(cfg=3.0), toy_family, toy_guidance), sample(toy_family)
    plain = objective()(made, guide)[0]
    same = objective(cfg=5.0, augmentation={"weight": 0.5})(made, guide)[0]
    torch.testing.assert_close(same, plain)
    assert not torch.isclose(objective(cfg=5.0)(made, guide)[0], plain)


def test_a_prediction_that_is_no_number_is_counted(toy_family: Any, toy_guidance: Any) -> None:
    def network(x: Tensor, t: Tensor, class_labels: Tensor, lora_scale: float) -> Tensor:
        prediction = toy_guidance(x, t, class_labels, lora_scale=lora_scale).clone()
        prediction[class_labels == 3, 0, 0, 0] = float("nan")
        return prediction

    loss, values = objective()(sample(toy_family), Guide(schema.Guidance(cfg=2.0), toy_family, network))
    assert (float(values[f"silenced/{KIND}"]), bool(loss.isfinite())) == (1.0, True)


def test_predictions_are_counted_as_they_are_made(
    make_recipe: Callable[..., schema.Recipe], toy_family: Any, toy_guidance: Any
) -> None:
    recipe = make_recipe(objectives=[{"kind": KIND, "cfg": 2.0}, {"kind": "distribution_matching"}], guidance={})
    rows: Counter[str] = Counter()

    def network(x: Tensor, t: Tensor, class_labels: Tensor, lora_scale: float) -> Tensor:
        rows["fake_score" if lora_scale else "teacher"] += len(x)
        return toy_guidance(x, t, class_labels, lora_scale=lora_scale)

    guide, made = Guide(recipe.guidance, toy_family, network), sample(toy_family)
    objective(cfg=2.0)(made, guide)
    DistributionMatching(DistributionMatchingSection(kind="distribution_matching"), "d")(made, guide)
    asked = predictions(recipe)
    assert {role: count / 6 for role, count in rows.items()} == {role: asked[role] for role in rows}
    assert rows["teacher"] == 6 * (3 + 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "objectives.0.cfg: is null and guidance.cfg is 1"),
        ({"cfg": 1.0}, "objectives.0.cfg: "),
        ({"cfg": 2.0, "matching": {"weight": 0}}, "objectives.0.matching.weight: "),
        ({"cfg": 2.0, "augmentation": {"normalise": "fake"}}, "objectives.0.augmentation.normalise: "),
    ],
)
def test_mistakes_in_the_recipe(make_recipe_dict: Callable[..., Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(make_recipe_dict(objectives=[{"kind": KIND, **changes}]))
    assert str(caught.value).startswith(said)
