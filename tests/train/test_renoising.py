"""Noise on the next state of a rollout, on the toy family; formulas are written out by hand."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dmdr_core import FlowMatching, VariancePreserving, randn, sub_interval_loss
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.objectives.distribution_matching import DistributionMatching, DistributionMatchingSection
from dmdr_train.planning.memory import moments
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.training.guide import Guide
from dmdr_train.training.sample import Sample
from torch import Tensor

T, NEXT = [1.0, 0.75, 0.5, 0.25], [0.75, 0.5, 0.25, 0.0]


def sample(family: Any, copies: int = 1) -> Sample:
    """A sample at each step of a deterministic rollout of four steps; a step goes a part of the way to x0."""
    draws = Draws(7, ("generator", 3), range(4 * copies))
    x0 = randn((4 * copies, 1, 2, 2), draws.each("x0")).requires_grad_()
    x_t = randn(x0.shape, draws.each("x_t"))
    t, t_next = (torch.tensor(times * copies) for times in (T, NEXT))
    share = (t_next / t).reshape(-1, 1, 1, 1)
    prompts = [index % 3 for index in range(4 * copies)]
    return Sample(
        x0, prompts, family.condition(prompts), draws, 3, x_t, t, t_next, prompts, lambda s: s.x0,
        lambda s: (share * s.x_t + (1 - share) * s.x0).detach(),
    )  # fmt: skip


def guide_of(family: Any, network: Any, **settings: Any) -> Guide:
    return Guide(schema.Guidance(renoise_from="next_state", **settings), family, network)


def test_the_point_by_hand(toy_family: Any, toy_guidance: Any) -> None:
    made, guide = sample(toy_family, copies=50), guide_of(toy_family, toy_guidance)
    at = guide.renoise(made)
    s, t = (each.reshape(-1, 1, 1, 1) for each in (made.t_next, at.t))
    a = (1 - t) / (1 - s)
    expected = a * made.next_state + (t**2 - a**2 * s**2).sqrt() * at.noise
    torch.testing.assert_close(at.x_t, expected, rtol=1e-4, atol=1e-4)
    assert bool((at.t >= made.t_next).all() & (at.t < 1).all())
    share = ((at.t - made.t_next) / (1 - made.t_next)).reshape(-1, 4)
    torch.testing.assert_close(share.mean(dim=0), torch.full((4,), 0.5), rtol=0, atol=0.1)  # over the whole interval
    assert torch.equal(guide.renoise(made).x_t, at.x_t)
    assert not at.x_t.requires_grad


def test_the_last_step_goes_to_a_clean_sample(toy_family: Any, toy_guidance: Any) -> None:
    """Also where sampling ends at 0.001, whose x0 all processes take for clean."""
    from dataclasses import replace

    toy_family.process = FlowMatching(t_end=0.001)
    made = sample(toy_family)
    made = replace(made, t_next=made.t_next.clamp(min=0.001), advance=lambda s: s.x0.detach())
    at = guide_of(toy_family, toy_guidance).renoise(made)
    x0, noise = made.x0[3].detach(), at.noise[3]
    torch.testing.assert_close(at.x_t[3], (1 - at.t[3]) * x0 + at.t[3] * noise)


def test_what_the_fake_score_learns(toy_family: Any, toy_guidance: Any) -> None:
    """The loss, and where its gradients flow: into the fake score through its first prediction alone."""
    made = sample(toy_family)
    loss = guide_of(toy_family, toy_guidance, consistency=0.5).loss(made)
    plain = guide_of(toy_family, toy_guidance, consistency=0.0)
    at = plain.renoise(made)
    t, s = at.t.reshape(-1, 1, 1, 1), made.t_next.reshape(-1, 1, 1, 1)
    labels = torch.tensor(made.prompts)

    prediction = toy_guidance(at.x_t, at.t, labels, 2.0)
    x0 = at.x_t - t * prediction
    share = torch.stack([torch.rand((), generator=each) for each in made.draws.each("consistency_time")])
    later = t - share.reshape(-1, 1, 1, 1) * (t - s).clamp(max=0.1)
    a = (1 - t) / (1 - later)
    variance = t**2 - a**2 * later**2
    with torch.no_grad():
        there = (a * later**2 * at.x_t + (1 - later) * variance * x0) / t**2
        there += variance.clamp(min=0).sqrt() * later / t * randn(x0.shape, made.draws.each("consistency_noise"))
        target = there - later * toy_guidance(there, later.flatten(), labels, 2.0)
    first = sub_interval_loss(prediction, made.next_state, at.noise, made.t_next, at.t)
    expected = first + 0.5 * (x0 - target).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.loss(made), first)
    slopes = [torch.autograd.grad(each, toy_guidance.change, retain_graph=True)[0] for each in (loss, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)
    assert torch.autograd.grad(loss, made.x0, allow_unused=True) == (None,)


def test_matching_from_the_next_state(toy_family: Any, toy_guidance: Any) -> None:
    made, guide = sample(toy_family), guide_of(toy_family, toy_guidance, cfg=2.0)
    found = DistributionMatching(DistributionMatchingSection(kind="distribution_matching"), "d")
    (slope,) = torch.autograd.grad(found(made, guide)[0], made.x0)
    at = guide.renoise(made)
    fake, real = guide.fake(made, at), guide.real(made, at)
    norm = (made.x0 - real).abs().flatten(1).mean(dim=1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(slope * 16, ((fake - real) / norm).detach())


# -- the recipe

FOUR = {"steps": 4, "mode": "ode"}


@pytest.mark.parametrize(("consistency", "extra"), [(None, 3), (0.1, 3), (0, 0)])
def test_predictions_are_counted_as_they_are_made(
    make_recipe: Callable[..., schema.Recipe], toy_family: Any, toy_guidance: Any, consistency: float, extra: int
) -> None:
    guidance = {"ratio": 3, "renoise_from": "next_state", "consistency": consistency}
    recipe = make_recipe(rollout=FOUR, guidance=guidance)
    rows: Counter[bool] = Counter()

    def network(x: Tensor, t: Tensor, class_labels: Tensor, lora_scale: float) -> Tensor:
        rows[torch.is_grad_enabled()] += len(x)
        return toy_guidance(x, t, class_labels, lora_scale=lora_scale)

    for _ in range(recipe.guidance.ratio):
        Guide(recipe.guidance, toy_family, network).loss(sample(toy_family))
    asked = predictions(recipe)
    assert (rows[True] / 4, rows[False] / 4) == (asked["fake_score trained"], asked["fake_score"] - 1)
    assert rows[False] / 4 == extra


def test_the_plan_knows_the_second_prediction(make_recipe: Callable[..., schema.Recipe], toy_costs: Any) -> None:
    from dataclasses import replace

    fake_score, teacher = replace(toy_costs.fake_score, held=3), replace(toy_costs.teacher, peak_forward=4)
    costs = replace(toy_costs, fake_score=fake_score, teacher=teacher)
    name = "self-consistency of the fake score"
    found = [
        moments(make_recipe(rollout=FOUR, guidance=guidance), costs, 5).get(name)
        for guidance in ({"renoise_from": "next_state"}, {"renoise_from": "next_state", "consistency": 0}, {})
    ]
    assert found == [5 * (3 + 4), None, None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance": {"consistency": 0.1}}, "guidance.consistency: 0.1 has no effect with renoise_from x0"),
        ({"guidance": {"renoise_from": "x1"}}, "guidance.renoise_from: "),
        ({"rollout": {"steps": 1}}, "guidance.renoise_from: next_state has no effect with rollout.steps 1"),
        ({"rollout": {**FOUR, "states": "authors"}}, "guidance.renoise_from: next_state does not go with rollout.stat"),
        (
            {"model__family": "sdxl", "data__prompts": "prompts.txt"},
            "guidance.renoise_from: next_state needs flow matching, which family sdxl is not; use x0",
        ),
    ],
)
def test_mistakes_in_the_recipe(make_recipe_dict: Callable[..., Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(make_recipe_dict(**{"rollout": FOUR, "guidance": {"renoise_from": "next_state"}, **changes}))
    assert str(caught.value).startswith(said)


def test_a_plugins_process_must_be_flow_matching(toy_family: Any, toy_guidance: Any) -> None:
    toy_family.process = VariancePreserving(torch.linspace(0.9, 0.1, 10))
    with pytest.raises(UserError, match=r"guidance.renoise_from: next_state needs flow matching, and this is a Varian"):
        guide_of(toy_family, toy_guidance)
