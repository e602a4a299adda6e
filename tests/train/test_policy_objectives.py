"""Objectives that compare the final pictures of a prompt, on the toy family; formulas are written out by hand."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from dmdr_core import rollout
from dmdr_rewards import RewardInfo
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws, named_generator
from dmdr_train.data.prompt_order import ClassLabels
from dmdr_train.evaluation.seeded_sampling import student_plan
from dmdr_train.objectives.direct_align import DirectAlign, DirectAlignSection
from dmdr_train.objectives.dpo import DPO, DPOSection
from dmdr_train.objectives.grpo import GRPO, GRPOSection
from dmdr_train.objectives.refl import FinalReFL, FinalReFLSection, ReFL, ReFLSection
from dmdr_train.planning.schedule import calls, stages
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.training.guide import Guide
from dmdr_train.training.picture_gradients import PictureGradients
from dmdr_train.training.rollouts import Rollouts
from dmdr_train.training.sample import Sample
from torch import Tensor

DRAWS = Draws(7, ("generator", 5), range(16))
NO_GUIDE: Any = None
REWARD = schema.Reward(name="toy")
RANGE = {"steps": 4, "mode": "sde", "shift": 3.0, "group_size": 4}


class Steps:
    """A reward without gradient and with a number per picture; it remembers what it saw."""

    def __init__(self, given: Sequence[float] | None = None, error: Exception | None = None, skipped: bool = False):
        self.info = RewardInfo("toy", "", (-9.0, 9.0), "", "", "class_label", False, None, "")
        self.given, self.error, self.seen = given, error, torch.empty(0)
        if skipped:
            self.skipped = 0

    def score(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        if self.error is not None:
            raise self.error
        self.seen = images
        scores = images.flatten(1).sum(dim=1).round(decimals=2) if self.given is None else torch.tensor(self.given)
        if hasattr(self, "skipped"):
            self.skipped += int(scores.isnan().sum())
        return scores


@pytest.fixture
def make_sample(make_recipe: Callable[..., Any], toy_family: Any, toy_generator: Any) -> Callable[..., Sample]:
    def make(decode: Any = None, draws: Draws = DRAWS, **changes: Any) -> Sample:
        recipe = make_recipe()
        recipe = recipe.model_copy(update={"rollout": schema.Rollout(**{**RANGE, **changes})})
        decode = decode or (lambda sample: toy_family.decode(sample.x0))
        made = Rollouts(recipe, toy_family, toy_generator, ClassLabels([0, 1, 2]), decode, torch.device("cpu"))
        return made.draw(draws, 0, GRPO.needs)

    return make


def grpo(reward: Any, **settings: Any) -> GRPO:
    return GRPO(GRPOSection(kind="grpo", reward=REWARD, **settings), "grpo", reward)


def slope(loss: Tensor, sample: Sample) -> Tensor:
    (found,) = torch.autograd.grad(loss, sample.x0)
    return found


# -- the ends of rollouts


def test_final_pictures_are_those_of_the_rollouts_that_go_on(
    make_sample: Callable[..., Sample], toy_family: Any, toy_generator: Any
) -> None:
    made = make_sample(mode="cps", eta=0.4)
    times = toy_family.grid(4, 3.0).times
    with torch.no_grad():
        for i in range(16):
            x, label = made.next_state[i : i + 1], torch.tensor(made.prompts[i : i + 1])
            fresh = named_generator(7, "generator", 5, "finish", i)
            for step in range(made.positions[i] + 1, 4):
                t, s = times[step], times[step + 1]
                velocity = toy_generator(x, t, label)
                clean, noise = x - t * velocity, x + (1 - t) * velocity
                angle = torch.tensor(0.4 * torch.pi / 2)
                x = clean
                if step < 3:
                    new = torch.randn(1, 1, 2, 2, generator=fresh)
                    x = (1 - s) * clean + s * (angle.cos() * noise + angle.sin() * new)
            torch.testing.assert_close(made.final_pictures[i], torch.sigmoid(x[0]), rtol=1e-5, atol=1e-5)
    assert not made.final_pictures.requires_grad


def test_states_of_partly_fresh_noise_are_visited(
    make_sample: Callable[..., Sample], toy_family: Any, toy_generator: Any
) -> None:
    """A share of noise that vanishes gives the deterministic rollout."""
    made = make_sample(mode="cps", eta=1e-6)
    noise = torch.cat([torch.randn(1, 1, 2, 2, generator=g) for g in DRAWS.each("noise")])
    whole = rollout(
        lambda x, t: toy_family.predict(toy_generator, x, t, made.condition),
        toy_family.process,
        toy_family.grid(4, 3.0),
        noise,
        "ode",
    )
    for i, position in enumerate(made.positions):
        torch.testing.assert_close(made.x_t[i], whole.states[position][i], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.final_pictures, torch.sigmoid(whole.x0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reuse", ["sample", "states"])
def test_samples_that_are_reused_have_the_same_ends(make_sample: Callable[..., Sample], reuse: str) -> None:
    torch.testing.assert_close(make_sample(reuse=reuse).final_x0, make_sample().final_x0)


def test_students_of_partly_fresh_noise_are_sampled_without_it(make_recipe: Callable[..., Any]) -> None:
    methods = {mode: student_plan(make_recipe(rollout={"steps": 2, "mode": mode})).method for mode in ("sde", "cps")}
    assert methods == {"sde": "sde", "cps": "euler"}


# -- GRPO


@pytest.mark.parametrize(("mode", "eta", "steps"), [("sde", None, None), ("cps", 0.6, None), ("sde", None, 1)])
def test_grpo_by_hand(make_sample: Callable[..., Sample], mode: str, eta: float | None, steps: int | None) -> None:
    """Per sample −A / B / D · (x_s − mean) / std² · ∂mean/∂x0 at steps that are trained, otherwise 0."""
    made, reward = make_sample(mode=mode, eta=eta), Steps()
    loss, values = grpo(reward, steps=steps)(made, NO_GUIDE)
    assert torch.equal(reward.seen, made.final_pictures)
    scores = reward.seen.flatten(1).sum(dim=1).round(decimals=2).reshape(4, 4)
    advantage = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, correction=0, keepdim=True)
    share = torch.tensor((1.0 if eta is None else eta) * torch.pi / 2)
    expected = torch.zeros_like(made.x0)
    for i, (position, a) in enumerate(zip(made.positions, advantage.flatten(), strict=True)):
        if position >= (steps or 3):
            continue
        t, s, x0 = made.t[i], made.t_next[i], made.x0[i].detach()
        kept = s * share.cos()  # of the noise that the prediction implies
        mean = (1 - s) * x0 + kept * (made.x_t[i] - (1 - t) * x0) / t
        factor = (1 - s) - kept * (1 - t) / t
        expected[i] = -a / 16 / 4 * (made.next_state[i] - mean) / (s * share.sin()) ** 2 * factor
    torch.testing.assert_close(slope(loss, made), expected, rtol=1e-3, atol=1e-5)
    assert 0 < int(expected.flatten(1).any(dim=1).sum()) < 16
    assert float(values["reward/toy"]) == pytest.approx(scores.mean().item(), rel=1e-5)
    assert float(values["reward_std/grpo"]) == pytest.approx(scores.std(dim=1, correction=0).mean().item(), rel=1e-4)


def test_a_constant_group_trains_nothing(make_sample: Callable[..., Sample]) -> None:
    made = make_sample()
    loss, values = grpo(Steps([0.5] * 8 + [0.0, 1.0] * 4))(made, NO_GUIDE)
    moved = slope(loss, made).flatten(1).any(dim=1)
    assert not moved[:8].any()
    assert moved[8:].any()
    assert float(values["constant_groups/grpo"]) == 0.5


def test_unscored_pictures_count_as_the_mean_of_their_group(make_sample: Callable[..., Sample]) -> None:
    nan = float("nan")
    given = [0.0, 1.0, nan, 1.0, *[nan] * 4, *[1.0, 0.0] * 4]
    filled = [0.0, 1.0, 2 / 3, 1.0, *[0.0] * 4, *[1.0, 0.0] * 4]
    made, same = make_sample(), make_sample()
    loss, values = grpo(Steps(given, skipped=True))(made, NO_GUIDE)
    expected, _ = grpo(Steps(filled))(same, NO_GUIDE)
    torch.testing.assert_close(slope(loss, made), slope(expected, same))
    assert float(values["unscored/grpo"]) == 5 / 16
    assert float(values["reward/toy"]) == pytest.approx(6 / 11)


@pytest.mark.parametrize("reward", [Steps(error=OSError("no answer")), Steps([float("nan"), *[0.0] * 15])])
def test_a_reward_that_fails_stops_the_update(make_sample: Callable[..., Sample], reward: Any) -> None:
    objective = grpo(reward)
    loss, _ = objective(make_sample(), NO_GUIDE)
    assert not loss.isfinite()
    assert objective.failure == ("toy of the objective grpo: no answer" if reward.error else "")


def test_the_reward_reads_its_template(make_sample: Callable[..., Sample]) -> None:
    read: list[Any] = []
    reward = Steps([0.0, 1.0] * 8)
    score, reward.score = reward.score, lambda images, prompts: read.extend(prompts) or score(images, prompts)  # type: ignore
    grpo(reward, template="Realistic photo {prompt}")(replace(make_sample(), prompts=["a cat"] * 16), NO_GUIDE)
    assert read == ["Realistic photo a cat"] * 16


def test_noise_that_a_group_shares_makes_the_gradient_less_noisy(
    make_sample: Callable[..., Sample], toy_generator: Any
) -> None:
    """By the spread of the gradient, relative to its mean, where every update has all steps equally often."""

    def spread(shared: str, positions: str) -> float:
        found = []
        for update in range(100):
            draws = Draws(7, ("generator", update), range(16))
            made = make_sample(group_noise=shared, positions=positions, draws=draws)
            loss, _ = grpo(Steps())(made, NO_GUIDE)
            found.append(torch.autograd.grad(loss, toy_generator.base)[0])
        gradients = torch.stack(found)
        return float(gradients.std(dim=0).norm() / gradients.mean(dim=0).norm())

    own = spread("own", "stratified")
    for shared in ("steps", "all"):
        assert spread(shared, "stratified") < 0.85 * own
        assert spread(shared, "independent") > 0.85 * own


# -- ReFL through the last step


def test_only_the_last_step_follows_the_rewards_gradient(make_sample: Callable[..., Sample]) -> None:
    made, reward = texts_of(make_sample()), Words()
    settings: dict[str, Any] = {"reward": REWARD, "margin": 9.0}
    loss, _ = FinalReFL(FinalReFLSection(kind="final_refl", **settings), "final_refl", reward)(made, NO_GUIDE)
    whole, _ = ReFL(ReFLSection(kind="refl", **settings), "refl", reward)(replace(made), NO_GUIDE)
    found, everywhere = slope(loss, made), slope(whole, made)
    last = torch.tensor([position == 3 for position in made.positions])
    assert 0 < int(last.sum()) < 16
    torch.testing.assert_close(found[last], everywhere[last])
    assert not found[~last].any()
    assert everywhere[~last].any()


# -- DPO


@pytest.mark.parametrize(("mode", "eta", "steps"), [("sde", None, None), ("cps", 0.6, 2)])
def test_dpo_by_hand(
    make_sample: Callable[..., Sample],
    toy_family: Any,
    toy_guidance: Any,
    mode: str,
    eta: float | None,
    steps: int | None,
) -> None:
    """−mean log σ(β (d_best − d_worst)); d is half the difference of the squared distances from both means, by std²."""
    made = make_sample(mode=mode, eta=eta)
    given = [0.3, 0.9, 0.1, 0.5, *[1.0] * 4, 0.2, 0.2, 0.7, 0.2, *[0.0, 1.0, 2.0, -3.0]]
    settings = DPOSection(kind="dpo", reward=REWARD, beta=5.0, steps=steps)
    loss, values = DPO(settings, "dpo", Steps(given))(made, Guide(schema.Guidance(), toy_family, toy_guidance))
    share = torch.tensor((1.0 if eta is None else eta) * torch.pi / 2)
    x0 = made.x0.detach().requires_grad_()
    with torch.no_grad():
        teacher = made.x_t - made.t.reshape(-1, 1, 1, 1) * toy_guidance(
            made.x_t, made.t, torch.tensor(made.prompts), lora_scale=0.0
        )
    d = []
    for i, position in enumerate(made.positions):
        t, s, distance = made.t[i], made.t_next[i], []
        for clean in (x0[i], teacher[i]):
            mean = (1 - s) * clean + s * share.cos() * (made.x_t[i] - (1 - t) * clean) / t
            distance.append(((made.next_state[i] - mean) ** 2).mean() / (s * share.sin()) ** 2)
        d.append((distance[1] - distance[0]) / 2 if position < (steps or 3) else 0 * x0[i].sum())
    pairs = [(1, 2), None, (10, 8), (14, 15)]
    losses = [-torch.log(torch.sigmoid(5 * (d[pair[0]] - d[pair[1]]))) for pair in pairs if pair]
    expected = torch.stack(losses).sum() / 4
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    (by_hand,) = torch.autograd.grad(expected, x0)
    torch.testing.assert_close(slope(loss, made), by_hand, rtol=1e-3, atol=1e-6)
    assert by_hand.flatten(1).any(dim=1).sum() > 1
    assert float(values["equal_pairs/dpo"]) == 0.25


def test_the_reference_is_the_teacher_without_a_lora_in_the_dynamic_phase_too(
    make_sample: Callable[..., Sample], toy_family: Any, toy_guidance: Any
) -> None:
    made, dynamics = make_sample(), schema.Dynamics(steps=10, teacher_scale=0.75)
    guide = Guide(schema.Guidance(dynamics=dynamics), toy_family, toy_guidance)
    a, b, c, d = toy_guidance.base.tolist()
    t, label = made.t.reshape(-1, 1, 1, 1), torch.tensor(made.prompts).reshape(-1, 1, 1, 1) + 1
    expected = made.x_t - t * (a * made.x_t + b * torch.sin(3 * made.x_t) + c * t + d * label)
    torch.testing.assert_close(guide.reference(made), expected)


# -- SRPO in its full form


class Words:
    """A reward that likes bright pictures the more, the longer the text is."""

    def __init__(self) -> None:
        self.info = RewardInfo("toy", "", (-9.0, 9.0), "", "", "text", True, None, "")
        self.read: list[str] = []

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.read += prompts
        return images.flatten(1).square().mean(dim=1) * torch.tensor([float(len(text)) for text in prompts]) / 10


def aligned(**settings: Any) -> tuple[DirectAlign, Words]:
    section = DirectAlignSection(kind="direct_align", reward=REWARD, positive=["Fine"], negative=["Oil"], **settings)
    return DirectAlign(section, "direct_align", reward := Words()), reward


def texts_of(made: Sample) -> Sample:
    return replace(made, prompts=["a cat"] * 16)


def test_direct_align_by_hand(make_sample: Callable[..., Sample], toy_family: Any) -> None:
    """Per sample −λ w / B · ∂r(text, y ± share (x0 − y)) / ∂x0; the reward is a square mean here."""
    made = make_sample(mode="ode")
    objective, reward = aligned(k=0.5, share=0.4, discount=0.2)
    loss, values = objective(texts_of(made), NO_GUIDE)
    back = [torch.rand((), generator=g).item() < 0.5 for g in DRAWS.each("branch")]
    assert reward.read == ["Oil. a cat" if inverted else "Fine. a cat" for inverted in back]
    expected = torch.zeros_like(made.x0)
    for i, inverted in enumerate(back):
        sign, length, w = (-1, len("Oil. a cat"), 1.0) if inverted else (1, len("Fine. a cat"), 1.5)
        discount = 1 - 0.8 * made.positions[i] / 3
        y, x0 = made.final_x0[i], made.x0[i].detach().requires_grad_()
        picture = torch.sigmoid(y + sign * 0.4 * (x0 - y))
        (expected[i],) = torch.autograd.grad(-discount * w / 16 * picture.square().mean() * length / 10, x0)
    torch.testing.assert_close(slope(loss, made), expected, rtol=1e-4, atol=1e-7)
    assert not made.final_x0.requires_grad
    assert 0 < sum(back) < 16
    assert values["k/direct_align"] == 0.5


def test_the_inversion_branch_penalises(make_sample: Callable[..., Sample]) -> None:
    """A brighter x0 lowers the loss in the denoising branch and raises it in the other."""
    made = make_sample(mode="ode")
    loss, _ = aligned(share=0.4)[0](texts_of(made), NO_GUIDE)
    for found, g in zip(slope(loss, made), DRAWS.each("branch"), strict=True):
        inverted = torch.rand((), generator=g).item() < 0.5
        assert bool((found > 0).all()) == inverted
        assert bool((found < 0).all()) != inverted


def test_a_recovered_picture_is_the_final_one_where_the_prediction_is(make_sample: Callable[..., Sample]) -> None:
    """At the last step x0 is the end of the rollout: all branches see its picture."""
    made = make_sample(mode="ode", decode=lambda sample: seen.append(sample.x0.detach()) or sample.x0.sigmoid())
    seen: list[Tensor] = []
    aligned()[0](texts_of(made), NO_GUIDE)
    last = [i for i, position in enumerate(made.positions) if position == 3]
    assert last
    torch.testing.assert_close(seen[0][last], made.x0.detach()[last])


def test_direct_align_leaves_out_what_the_reward_leaves_without_a_score(make_sample: Callable[..., Sample]) -> None:
    made = texts_of(make_sample(mode="ode"))
    objective, reward = aligned()
    whole = slope(objective(made, NO_GUIDE)[0], made)
    score, reward.skipped = reward.score, 0  # type: ignore[attr-defined]

    def partly(images: Tensor, prompts: Sequence[str]) -> Tensor:
        reward.skipped += 1  # type: ignore[attr-defined]
        return score(images, prompts) * torch.tensor([float("nan")] + [1.0] * 15)

    reward.score = partly  # type: ignore[method-assign]
    loss, values = objective(made, NO_GUIDE)
    found = slope(loss, made)
    assert bool(loss.isfinite())
    assert not found[0].any()
    torch.testing.assert_close(found[1:], whole[1:])
    assert float(values["unscored/direct_align"]) == pytest.approx(1 / 16)


def test_k_changes_on_a_line(make_sample: Callable[..., Sample]) -> None:
    objective, _ = aligned(k=0.1, k_end=0.5, k_steps=4, start=10)
    assert [objective.k(step) for step in (10, 12, 14, 20)] == pytest.approx([0.1, 0.3, 0.5, 0.5])


def test_its_pictures_do_not_disturb_those_that_objectives_share(make_sample: Callable[..., Sample]) -> None:
    made = texts_of(make_sample(mode="ode"))
    decoder = PictureGradients(made.decode)
    at = replace(made, x0=made.x0.detach().requires_grad_(), decode=decoder)
    shared = at.pictures
    loss, _ = aligned()[0](at, NO_GUIDE)
    term = decoder.term("direct_align", 1.0, loss, at.x0)
    assert decoder.decoded is not None
    assert decoder.pictures is not None
    assert torch.equal(decoder.pictures, shared)
    assert term.at_pictures is None
    assert term.at_x0 is not None


# -- recipes


def recipe_of(make_recipe_dict: Callable[..., dict[str, Any]], **changes: Any) -> dict[str, Any]:
    matching, policy = {"kind": "distribution_matching"}, {"kind": "grpo", "reward": {"name": "vlm-judge"}}
    rollout = {"steps": 4, "group_size": 2, **changes.pop("rollout", {})}
    return make_recipe_dict(
        objectives=[matching, {**policy, **changes.pop("objective", {})}], rollout=rollout, **changes
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollout": {"mode": "ode"}},
            "rollout.mode: ode draws no noise between steps, and grpo trains the density of",
        ),
        ({"rollout": {"steps": 1}}, "rollout.steps: 1 draws no noise between steps, and grpo trains the density of"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size: is 1 and grpo compares the samples of a prompt"),
        ({"rollout": {"states": "authors"}}, "rollout.states: authors are no states of the rollout that grpo"),
        ({"rollout": {"eta": 0.5}}, "rollout.eta: 0.5 has no effect with rollout.mode sde; use mode cps"),
        ({"objective": {"steps": 4}}, "objectives.1.steps: 4 is more than the 3 steps that draw noise; use fewer"),
        ({"objective": {"ratio": 2.0}}, "objectives.1.ratio: 2.0 has no effect beside a given weight"),
        ({"objective": {"margin": 2.0}}, "objectives.1.margin: unknown key"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    make_recipe_dict: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        parse_recipe(recipe_of(make_recipe_dict, **changes))
    assert str(refused.value).startswith(message)


def test_one_step_draws_no_partly_fresh_noise(make_recipe_dict: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"^rollout.mode: cps has no effect with one step; use sde, or 2 or more"):
        parse_recipe(make_recipe_dict(rollout={"mode": "cps"}))


def test_final_refl_needs_several_steps(make_recipe_dict: Callable[..., dict[str, Any]]) -> None:
    final = {"kind": "final_refl", "reward": {"name": "clip", "checkpoint": "there"}}
    with pytest.raises(UserError, match=r"^objectives.1.kind: final_refl is refl where a rollout has one step; use"):
        parse_recipe(make_recipe_dict(objectives=[{"kind": "distribution_matching"}, final]))


@pytest.mark.parametrize("given", [{"k_end": 0.5}, {"k_steps": 5}])
def test_half_a_schedule_of_k_is_refused(
    make_recipe_dict: Callable[..., dict[str, Any]], given: dict[str, Any]
) -> None:
    policy = {"kind": "direct_align", "reward": {"name": "clip", "checkpoint": "there"}, **given}
    with pytest.raises(UserError, match=rf"^objectives.1.{next(iter(given))}: k changes from k to k_end over k_steps"):
        parse_recipe(make_recipe_dict(objectives=[{"kind": "distribution_matching"}, policy]))


def test_what_each_objective_decodes(make_recipe_dict: Callable[..., dict[str, Any]]) -> None:
    """Decodings with gradient, backward passes through the decoder, and decodings without gradient."""
    reward = {"reward": {"name": "clip", "checkpoint": "there"}}
    kinds = {name: {"kind": name, **reward} for name in ("refl", "grpo", "direct_align")}
    expected = {("refl",): (1, 1, 0), ("grpo",): (0, 0, 1), ("refl", "grpo"): (1, 1, 1), ("direct_align",): (1, 1, 0),
                ("refl", "direct_align"): (2, 2, 0)}  # fmt: skip
    for names, numbers in expected.items():
        rollout = {"steps": 4, "group_size": 2 if "grpo" in names else 1}
        objectives = [{"kind": "distribution_matching"}, *(kinds[name] for name in names)]
        recipe = parse_recipe(make_recipe_dict(objectives=objectives, rollout=rollout))
        (stage,) = stages(recipe)
        made = calls(recipe, stage)
        assert (made.decodings, made.decoding_backwards, made.other_decodings) == numbers, names


@pytest.mark.parametrize(("zero_stage", "extra"), [(2, 1.5), (3, 3)])
def test_finished_rollouts_are_counted(
    make_recipe_dict: Callable[..., dict[str, Any]], zero_stage: int, extra: float
) -> None:
    policy = parse_recipe(recipe_of(make_recipe_dict, optim__zero_stage=zero_stage))
    plain = parse_recipe(make_recipe_dict(rollout={"steps": 4}, optim__zero_stage=zero_stage))
    assert predictions(policy)["generator"] == predictions(plain)["generator"] + extra
    assert predictions(policy)["generator trained"] == 1
    pairs = parse_recipe(recipe_of(make_recipe_dict, objective={"kind": "dpo"}, optim__zero_stage=zero_stage))
    assert predictions(pairs) == predictions(policy) | {"teacher": predictions(policy)["teacher"] + 1}


def test_a_finished_rollout_asks_for_every_step_once(
    make_sample: Callable[..., Sample], toy_family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, predict = [], toy_family.predict
    monkeypatch.setattr(
        toy_family, "predict", lambda *rest, **named: asked.append(len(rest[1])) or predict(*rest, **named)
    )
    made = make_sample()
    assert sum(asked) == sum(position + 1 for position in made.positions)
    made.final_pictures.sum()
    made.final_pictures.sum()
    assert sum(asked) == 4 * 16
