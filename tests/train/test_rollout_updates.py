"""Several updates of the generator on the samples of one rollout, on the toy family; PPO is written out by hand."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.data.prompt_order import ClassLabels
from dmdr_train.objectives.distribution_matching import DistributionMatching
from dmdr_train.objectives.dpo import DPO
from dmdr_train.objectives.grpo import GRPO, GRPOSection
from dmdr_train.planning.memory import sent_bytes
from dmdr_train.planning.plan import step_flops
from dmdr_train.planning.schedule import calls, stages
from dmdr_train.recipe import schema
from dmdr_train.recipe.load import parse_recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.training.guide import Guide
from dmdr_train.training.rollouts import Rollouts
from dmdr_train.training.sample import Sample
from dmdr_train.training.trainer import Trainer
from torch import Tensor

NO_GUIDE: Any = None
POLICY = {"kind": "grpo", "reward": {"name": "vlm-judge"}}
MATCHING = {"kind": "distribution_matching"}
ROLLOUT = {"steps": 4, "mode": "sde", "shift": 3.0, "group_size": 4, "updates": 2, "positions": "stratified"}


class Counts:
    """A reward without gradient that counts its calls."""

    info = SimpleNamespace(name="toy")

    def __init__(self) -> None:
        self.calls = 0

    def score(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        self.calls += 1
        return images.flatten(1).sum(dim=1)


class SGD:
    """An engine that takes plain gradient steps."""

    def __init__(self, module: Any, lr: float, accumulation: int):
        self.module, self.lr, self.accumulation, self.parts, self.updates = module, lr, accumulation, 0, 0

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        return self.module(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    @torch.no_grad()
    def step(self) -> None:
        self.parts += 1
        if self.parts % self.accumulation == 0:
            self.updates += 1
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter -= self.lr * parameter.grad
                    parameter.grad = None


@pytest.fixture
def make_trainer(
    make_recipe: Callable[..., Any], toy_family: Any, toy_generator: Any, toy_guidance: Any
) -> Callable[..., Trainer]:
    def make(*objectives: dict[str, Any], lr: float = 0.0, accumulation: int = 1, **rollout: Any) -> Trainer:
        recipe = make_recipe(
            objectives=[MATCHING, *(objectives or [POLICY])],
            rollout={**ROLLOUT, **rollout},
            optim__batch_size=16,
            optim__accumulation=accumulation,
        )
        kinds = {"distribution_matching": DistributionMatching, "grpo": GRPO, "dpo": DPO}
        made: list[Any] = [
            kinds[section.kind](section, name, *([] if section.kind == "distribution_matching" else [Counts()]))
            for name, section in zip(recipe.names, recipe.objectives, strict=True)
        ]
        generator, guidance = SGD(toy_generator, lr, accumulation), SGD(toy_guidance, 0.0, accumulation)
        device, decode = torch.device("cpu"), lambda sample: toy_family.decode(sample.x0)
        rollouts = Rollouts(recipe, toy_family, generator, ClassLabels([0, 1, 2]), decode, device)
        guide = Guide(recipe.guidance, toy_family, guidance)
        return Trainer(recipe, toy_family, generator, guide, made, rollouts, device)

    return make


def alone(trainer: Trainer) -> Trainer:
    """The same trainer without its distribution matching."""
    trainer.objectives = trainer.objectives[1:]
    return trainer


def draw(trainer: Trainer) -> Sample:
    (draws,) = trainer.micro_batches("generator", 0)
    return trainer.rollouts.draw(draws, 0)


# -- the ratio and the clip


def by_hand(weights: Tensor, sample: Sample) -> Tensor:
    """log N(x_s; (1 − s) x0, s²) of one dimension on average, `[B]`, with x0 by the toy network's formula."""
    a, b, c, d = weights
    t, s, label = (
        each.reshape(-1, 1, 1, 1) for each in (sample.t, sample.t_next, torch.tensor(sample.prompts, dtype=torch.float))
    )
    x = sample.x_t
    x0 = x - t * (a * x + b * torch.sin(3 * x) + c * t + d * (label + 1))
    s = torch.where(s == 0, 1.0, s)  # the last step draws nothing
    return (-0.5 * ((sample.next_state - (1 - s) * x0) / s) ** 2 - s.log()).flatten(1).mean(dim=1)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_two_updates_are_those_of_ppo(make_trainer: Callable[..., Trainer], accumulation: int) -> None:
    """Two steps down −mean min(ρ A, clamp(ρ, 0.9, 1.1) A); the second is clipped, and the batch may be split."""
    trainer = alone(make_trainer({**POLICY, "clip": 0.1}, lr=3.0, accumulation=accumulation))
    whole = alone(make_trainer(lr=0.0))
    sample = draw(whole)
    scores = sample.final_pictures.flatten(1).sum(dim=1).reshape(4, 4)
    advantage = (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, correction=0, keepdim=True)
    trained = torch.tensor([position < 3 for position in sample.positions])
    gain = advantage.flatten() * trained
    weights = trainer.generator.module.base.detach().clone().requires_grad_()
    old = by_hand(weights, sample).detach()
    for _ in range(2):
        ratio = (by_hand(weights, sample) - old).exp()
        loss = -torch.minimum(ratio * gain, ratio.clamp(0.9, 1.1) * gain).mean()
        (slope,) = torch.autograd.grad(loss, weights)
        (free,) = torch.autograd.grad(-((by_hand(weights, sample) - old).exp() * gain).mean(), weights)
        stopped = ((gain > 0) & (ratio > 1.1)) | ((gain < 0) & (ratio < 0.9))
        weights = (weights - 3.0 * slope).detach().requires_grad_()
    assert 0 < stopped.sum() < trained.sum()
    assert (slope - free).norm() > 0.1 * slope.norm()

    logs = trainer.train_step()
    torch.testing.assert_close(trainer.generator.module.base.detach(), weights.detach(), rtol=1e-4, atol=1e-5)
    assert trainer.generator.updates == 2
    assert trainer.objectives[0].reward.calls == accumulation
    if accumulation == 1:
        assert logs["clipped/grpo"] == pytest.approx((stopped.sum() / trained.sum()).item())
        assert logs["ratio/grpo"] == pytest.approx(ratio[trained].mean().item(), rel=1e-4)
        assert logs["loss/grpo"] == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("updates", [2, 3])
def test_a_generator_that_stays_has_the_ratio_one(make_trainer: Callable[..., Trainer], updates: int) -> None:
    trainer = make_trainer(lr=0.0, updates=updates)
    logs = trainer.train_step()
    assert (logs["ratio/grpo"], logs["clipped/grpo"]) == (1.0, 0.0)
    assert trainer.generator.updates == updates
    assert "ratio/grpo" not in make_trainer(updates=1).train_step()


@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_clip_stops_samples_that_have_gone_far_enough(
    make_trainer: Callable[..., Trainer], clip: float | None
) -> None:
    """x0 moves toward what was drawn, so that every ratio rises: samples with A > 0 stop, those with A < 0 go on."""
    sample = draw(make_trainer())
    policy = GRPO(GRPOSection(kind="grpo", reward=schema.Reward(name="toy"), clip=clip), "grpo", Counts())
    policy(sample, NO_GUIDE)
    scores = sample.final_pictures.flatten(1).sum(dim=1).reshape(4, 4)
    rises = (scores > scores.mean(dim=1, keepdim=True)).flatten()
    s = sample.t_next.reshape(-1, 1, 1, 1)
    away = sample.next_state - (1 - s) * sample.x0.detach()  # the noise that was drawn
    x0 = (sample.x0 + 0.7 * away / (1 - s)).detach().requires_grad_()
    loss, values = policy(replace(sample, x0=x0, again=True), NO_GUIDE)
    (slope,) = torch.autograd.grad(loss, x0)
    # The distance to the mean shrinks to 0.3 of it, so that log ρ = (1 − 0.09) / 2 · mean(noise² / s²).
    trained = torch.tensor([position < 3 for position in sample.positions])
    ratio = (0.5 * (1 - 0.3**2) * (away / s.clamp(min=1e-9)).square().flatten(1).mean(dim=1)).exp()
    stopped = trained & rises & (ratio > 1 + (clip or 0.001))
    assert 0 < stopped.sum() < trained.sum()
    assert torch.equal(slope.flatten(1).any(dim=1), trained & ~stopped)
    assert float(values["clipped/grpo"]) == pytest.approx((stopped.sum() / trained.sum()).item())
    assert float(values["ratio/grpo"]) == pytest.approx(ratio[trained].mean().item(), rel=1e-4)


# -- the trainer


def test_later_updates_keep_the_rollout_and_draw_the_rest_anew(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same states, next states, ends and prompts; new renoise times; the guide follows every update."""
    trainer = make_trainer(lr=0.1, accumulation=2, updates=3)
    seen: list[Sample] = []
    followed: list[int] = []
    matching, renoise = trainer.objectives[0], trainer.guide.renoise
    times: list[Tensor] = []

    class Spy(type(matching)):  # type: ignore[misc]
        def __call__(self, sample: Sample, guide: Any) -> Any:
            seen.append(sample)
            times.append(renoise(sample).t)
            return super().__call__(sample, guide)

    matching.__class__ = Spy
    monkeypatch.setattr(trainer.guide, "after_update", lambda generator, step: followed.append(generator.updates))
    trainer.train_step()
    assert followed == [1, 2, 3]
    assert len(seen) == 6
    for first, later in [(0, 2), (0, 4), (1, 3), (1, 5)]:
        one, other = seen[first], seen[later]
        last = torch.tensor([position == 3 for position in one.positions])
        torch.testing.assert_close(other.x_t, one.x_t, rtol=0, atol=0)
        torch.testing.assert_close(other.final_x0, one.final_x0, rtol=0, atol=0)
        torch.testing.assert_close(other.next_state[~last], one.next_state[~last], rtol=0, atol=0)
        torch.testing.assert_close(other.next_state[last], other.x0[last].detach(), rtol=0, atol=0)
        assert (other.prompts, other.group, other.positions) == (one.prompts, one.group, one.positions)
        assert (other.x0 - one.x0).abs().max() > 1e-4
        assert (times[later] - times[first]).abs().min() > 1e-4
        assert (one.again, other.again) == (False, True)
    assert len({sample.draws.update for sample in seen}) == 3
    assert all(len(sample.draws.update) == 2 for sample in seen)  # as the order of pairs needs


def test_steps_without_a_policy_take_one_update(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer({**POLICY, "start": 1}, updates=3)
    updates = []
    for _ in range(2):
        trainer.train_step()
        updates.append(trainer.generator.updates)
    assert updates == [1, 4]


def test_automatic_weights_follow_the_first_update(make_trainer: Callable[..., Trainer]) -> None:
    """Its gradient is that of A log p; the clip lowers those of later updates."""
    expected = alone(make_trainer(updates=1)).train_step()["grad_norm/grpo"]
    logs = alone(make_trainer({**POLICY, "clip": 0.05}, lr=3.0)).train_step()
    assert logs["clipped/grpo"] > 0
    assert logs["grad_norm/grpo"] == pytest.approx(expected, rel=1e-5)


def test_a_pair_of_dpo_may_serve_several_updates(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer({"kind": "dpo", "reward": {"name": "vlm-judge"}}, lr=0.1)
    before = make_trainer({"kind": "dpo", "reward": {"name": "vlm-judge"}}, updates=1).train_step()["loss/dpo"]
    assert trainer.train_step()["loss/dpo"] < before
    assert trainer.objectives[1].reward.calls == 1


def test_the_fake_score_learns_from_the_first_updates_samples(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(lr=0.1, reuse="sample")
    drawn, learned = draw(trainer).x0.detach(), []
    trainer.guide.learn = lambda sample: learned.append(sample.x0) or torch.zeros(())  # type: ignore
    trainer.train_step()
    for x0 in learned:
        torch.testing.assert_close(x0, drawn)


# -- recipes and plans


def recipe_of(make_recipe_dict: Callable[..., dict[str, Any]], *objectives: dict[str, Any], **changes: Any) -> Any:
    rollout = {"steps": 4, "group_size": 2, "updates": 3, **changes.pop("rollout", {})}
    return parse_recipe(make_recipe_dict(objectives=[MATCHING, *(objectives or [POLICY])], rollout=rollout, **changes))


@pytest.mark.parametrize(
    ("objective", "rollout", "message"),
    [
        ({**POLICY, "clip": 0.3}, {"updates": 1}, "objectives.1.clip: 0.3 has no effect with rollout.updates 1"),
        ({**POLICY, "clip": 1.0}, {}, "objectives.1.clip: "),
        (POLICY, {"through": True}, "rollout.through: true does not go with grpo"),
        (
            {"kind": "refl", "reward": {"name": "clip", "checkpoint": "there"}},
            {"group_size": 1},
            "rollout.updates: 3 has no effect without an objective on final pictures such as grpo; use 1",
        ),
    ],
)
def test_what_has_no_effect_is_refused(
    make_recipe_dict: Callable[..., dict[str, Any]], objective: dict[str, Any], rollout: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        recipe_of(make_recipe_dict, objective, rollout=rollout)
    assert str(refused.value).startswith(message)


def test_the_learning_rate_counts_updates(make_recipe_dict: Callable[..., dict[str, Any]]) -> None:
    policies = [{**POLICY, "start": 4, "stop": 7}, {**POLICY, "start": 6, "stop": 8, "clip": 0.1}]
    assert recipe_of(make_recipe_dict, *policies).generator_updates == 10 + 2 * 4
    assert recipe_of(make_recipe_dict, POLICY, rollout={"updates": 1}).generator_updates == 10


@pytest.mark.parametrize("kind", ["grpo", "dpo"])
def test_predictions_are_those_that_are_planned(make_trainer: Callable[..., Trainer], kind: str) -> None:
    trainer = make_trainer({**POLICY, "kind": kind}, updates=3)
    asked, predict = Counter[str](), trainer.family.predict

    def counted(network: Any, x_t: Tensor, *rest: Any, **named: Any) -> Tensor:
        own = network is trainer.generator
        role = "generator" if own else "fake_score" if named["lora_scale"] else "teacher"
        asked[role + " trained" * torch.is_grad_enabled()] += len(x_t)
        return predict(network, x_t, *rest, **named)

    trainer.family.predict = counted  # type: ignore[method-assign]
    trainer.train_step()
    assert asked == {role: 16 * count for role, count in predictions(trainer.settings).items()}


def test_a_plan_repeats_what_later_updates_repeat(make_recipe_dict: Callable[..., dict[str, Any]]) -> None:
    """Final pictures are decoded and scored once, those of x0 in every update, which also sends gradients."""
    refl = {"kind": "refl", "reward": {"name": "clip", "checkpoint": "there"}}
    once, thrice = (recipe_of(make_recipe_dict, POLICY, refl, rollout={"updates": n}) for n in (1, 3))
    (a,), (b,) = (stages(recipe) for recipe in (once, thrice))
    one, three = calls(once, a), calls(thrice, b)
    assert (one.updates, one.decodings, one.decoding_backwards, one.other_decodings) == (1, 1, 1, 1)
    assert (three.updates, three.decodings, three.decoding_backwards, three.other_decodings) == (3, 3, 3, 1)
    assert three.encodings == one.encodings

    cost = SimpleNamespace(forward=1, backward=2, both=3)
    reward = SimpleNamespace(image=cost, text=10)
    roles = {name: SimpleNamespace(trained=100, parameters=100) for name in ("generator", "fake_score")}
    costs: Any = SimpleNamespace(
        generator=cost,
        fake_score=cost,
        teacher=cost,
        decoder=cost,
        texts=0,
        rewards={1: reward, 2: reward},
        roles=roles,
    )
    assert step_flops(once, costs, a)["rewards"] == 4 * ((1 + 10) + (3 + 10))
    assert step_flops(thrice, costs, b)["rewards"] == 4 * ((1 + 10) + 3 * (3 + 10))
    sent = [sent_bytes(recipe, costs, made, 2) for recipe, made in ((once, one), (thrice, three))]
    assert sent[1] - sent[0] == 2 * 100 * 4 * 2 // 2
