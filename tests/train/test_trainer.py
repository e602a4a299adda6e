"""The training step against the formulas of the method, written out here sample by sample in plain torch."""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train.base.random_draws import Draws, named_generator
from dmdr_train.data.prompt_order import ClassLabels
from dmdr_train.objectives.distribution_matching import DistributionMatching
from dmdr_train.objectives.refl import ReFL
from dmdr_train.recipe.schema import Recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.training.guide import Guide, Teacher
from dmdr_train.training.rollouts import Rollouts
from dmdr_train.training.sample import Sample
from dmdr_train.training.trainer import Trainer, numbers
from torch import Tensor

CLASSES = 3
SHAPE = (1, 1, 2, 2)


class Reward:
    """A reward that depends on picture and label."""

    info = SimpleNamespace(name="toy")

    def score(self, images: Tensor, prompts: list[int]) -> Tensor:
        return images.flatten(1).mean(dim=1) - 0.1 * torch.tensor(prompts)


@pytest.fixture
def make_trainer(
    make_recipe: Callable[..., Recipe], toy_family: Any, toy_generator: Any, toy_guidance: Any
) -> Callable[..., Trainer]:
    def make(rank: int = 0, world: int = 1, step: int = 0, **settings: Any) -> Trainer:
        recipe = make_recipe(**settings)
        made: list[Any] = []
        for name, objective in zip(recipe.names, recipe.objectives, strict=True):
            if objective.kind == "distribution_matching":
                made.append(DistributionMatching(objective, name))
            else:
                made.append(ReFL(objective, name, Reward()))
        prompts = ClassLabels(list(range(CLASSES)))
        device = torch.device("cpu")
        guide = Guide(recipe.guidance, toy_family, toy_guidance)
        rollouts = Rollouts(
            recipe, toy_family, toy_generator, prompts, lambda sample: toy_family.decode(sample.x0), device
        )
        share = {} if world == 1 else {"rank": rank, "world": world}  # one process is the default
        trainer = Trainer(recipe, toy_family, toy_generator, guide, made, rollouts, device, **share)
        trainer.step += step
        return trainer

    return make


def draw(trainer: Trainer, draws: Draws) -> Sample:
    return trainer.rollouts.draw(draws, trainer.step, trainer.needs())


def fake_score_loss(trainer: Trainer, draws: Draws) -> Tensor:
    with torch.no_grad():
        sample = draw(trainer, draws)
    return trainer.guide.loss(sample)


def generator_loss(trainer: Trainer, draws: Draws) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    return trainer.generator_loss(draw(trainer, draws))


class ByHand:
    """One sample of one update. Everything that trainer, objectives and dmdr_core do to it, in plain torch."""

    def __init__(self, trainer: Trainer, update: str, number: int, index: int):
        self.settings, self.step = trainer.settings, trainer.step
        self.generator, self.guidance = trainer.generator, trainer.guidance
        self.name = (update, number)
        self.index = index
        self.label = torch.randint(CLASSES, (1,), generator=self.draw("prompt"))
        self.position = int(torch.randint(self.settings.rollout.steps, (1,), generator=self.draw("grid_step")))

    def draw(self, purpose: str) -> torch.Generator:
        return named_generator(self.settings.run.seed, *self.name, purpose, self.index)

    def fade(self) -> float:
        dynamics = self.settings.guidance.dynamics
        return 0.5 * (1 + math.cos(math.pi * min(self.step / dynamics.steps, 1))) if dynamics else 0.0

    def times(self) -> list[float]:
        steps, s = self.settings.rollout.steps, self.settings.rollout.shift
        return [s * t / (1 + (s - 1) * t) for t in (1 - i / steps for i in range(steps + 1))]

    def v(self, x: Tensor, t: float) -> Tensor:
        return self.generator(x, torch.tensor([t]), self.label)

    def state(self) -> tuple[Tensor, float]:
        """Where sampling is when it comes to the chosen time of the grid."""
        times, fresh, chosen = self.times(), self.draw("rollout"), self.position
        x = torch.randn(SHAPE, generator=self.draw("noise"))
        for t, t_next in itertools.pairwise(times[: chosen + 1]):
            if self.settings.rollout.mode == "sde":
                x0 = x - t * self.v(x, t)
                x = (1 - t_next) * x0 + t_next * torch.randn(SHAPE, generator=fresh)
            else:
                x = x + (t_next - t) * self.v(x, t)
        if self.settings.rollout.states == "authors":
            for t, t_next in itertools.pairwise(times[chosen:] if self.settings.rollout.mode == "ode" else ()):
                x0, x = x - t * self.v(x, t), x + (t_next - t) * self.v(x, t)
            if self.settings.rollout.mode == "sde":
                x0 = x - times[chosen] * self.v(x, times[chosen])
            x = (1 - times[chosen]) * x0 + times[chosen] * torch.randn(SHAPE, generator=fresh)
        return x.detach(), times[chosen]

    def x0(self) -> Tensor:
        x, t = self.state()
        return x - t * self.v(x, t)

    def renoised(self, x0: Tensor) -> tuple[Tensor, Tensor, float]:
        dynamics = self.settings.guidance.dynamics
        if dynamics and dynamics.renoise:
            a = 1 + (dynamics.renoise.alpha - 1) * self.fade()
            b = 1 + (dynamics.renoise.beta - 1) * self.fade()
            x, y = torch._standard_gamma(
                torch.tensor([a, b], dtype=torch.float64), generator=self.draw("renoise_time")
            ).tolist()
            tau = x / (x + y)
        else:
            tau = float(torch.rand((), generator=self.draw("renoise_time"), dtype=torch.float64))
        noise = torch.randn(SHAPE, generator=self.draw("renoise_noise"))
        return (1 - tau) * x0 + tau * noise, noise, tau

    def fake_score_loss(self) -> Tensor:
        x0 = self.x0().detach()
        x, noise, tau = self.renoised(x0)
        v = self.guidance(x, torch.tensor([tau]), self.label, lora_scale=self.settings.guidance.fake_scale)
        return (v - (noise - x0)).square().mean()

    def distribution_matching_loss(self, w: float) -> Tensor:
        x0, guidance = self.x0(), self.settings.guidance
        with torch.no_grad():
            x, _, tau = self.renoised(x0)
            t, null = torch.tensor([tau]), torch.tensor([CLASSES])
            s_r = guidance.dynamics.teacher_scale * self.fade() if guidance.dynamics else 0.0
            fake = x - tau * self.guidance(x, t, self.label, lora_scale=guidance.fake_scale)
            cond = self.guidance(x, t, self.label, lora_scale=s_r)
            uncond = self.guidance(x, t, null, lora_scale=s_r)
            real = x - tau * (uncond + w * (cond - uncond))
            g = (fake - real) / ((x0 - real).abs().mean() + 1e-8)
        return 0.5 * (x0 - (x0 - g).detach()).square().mean()

    def refl_loss(self, margin: float) -> Tensor:
        reward = torch.sigmoid(self.x0()).mean() - 0.1 * self.label[0]
        return torch.relu(margin - reward)


def gradients(network: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])


def zero(*networks: Any) -> None:
    for network in networks:
        network.zero_grad(set_to_none=True)


DYNAMICS = {"steps": 10, "teacher_scale": 0.75, "renoise": {"alpha": 4.0, "beta": 1.5}}
REFL = {"kind": "refl", "weight": 0.3, "margin": 0.9, "start": 3, "reward": {"name": "toy", "checkpoint": "none"}}
CASES: dict[str, dict[str, Any]] = {
    "one step": {},
    "sde": {"rollout": {"steps": 4, "mode": "sde", "shift": 3.0}},
    "ode": {"rollout": {"steps": 4, "mode": "ode", "shift": 3.0}},
    "sde, authors": {"rollout": {"steps": 4, "mode": "sde", "shift": 3.0, "states": "authors"}},
    "ode, authors": {"rollout": {"steps": 4, "mode": "ode", "shift": 3.0, "states": "authors"}},
    "in step": {"rollout": {"steps": 4, "shift": 3.0}, "optim__zero_stage": 3},
    "both dynamics": {"guidance__dynamics": DYNAMICS},
    "teacher alone dynamic": {"guidance__dynamics": {**DYNAMICS, "renoise": None}},
    "after the dynamics": {"guidance__dynamics": DYNAMICS, "step": 9},
    "guided": {"guidance__cfg": 2.5, "guidance__fake_scale": 1.5},
    "all": {"guidance": {"cfg": 2.5, "dynamics": DYNAMICS}, "rollout": {"steps": 3, "shift": 2.0}, "step": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_fake_score_loss(make_trainer: Callable[..., Trainer], case: str) -> None:
    trainer = make_trainer(optim__batch_size=8, **CASES[case])
    samples = [ByHand(trainer, "fake_score", 17, i) for i in range(8)]
    expected = torch.stack([sample.fake_score_loss() for sample in samples]).mean()
    expected.backward()
    slope = gradients(trainer.guidance)
    zero(trainer.generator, trainer.guidance)

    loss = fake_score_loss(trainer, trainer.micro_batches("fake_score", 17)[0])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(trainer.guidance), slope, rtol=1e-4, atol=1e-6)
    assert trainer.generator.base.grad is None
    assert trainer.guidance.base.grad is None


@pytest.mark.parametrize("case", CASES)
def test_generator_loss(make_trainer: Callable[..., Trainer], case: str) -> None:
    trainer = make_trainer(optim__batch_size=8, **CASES[case])
    w = trainer.settings.guidance.cfg
    samples = [ByHand(trainer, "generator", 5, i) for i in range(8)]
    expected = torch.stack([sample.distribution_matching_loss(w) for sample in samples]).mean()
    expected.backward()
    slope = gradients(trainer.generator)
    zero(trainer.generator, trainer.guidance)

    loss, logs, _ = generator_loss(trainer, trainer.micro_batches("generator", 5)[0])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(trainer.generator), slope, rtol=1e-4, atol=1e-6)
    assert trainer.guidance.base.grad is None
    assert trainer.guidance.change.grad is None
    assert logs["loss/distribution_matching"] == loss.item()


def test_the_teacher_is_the_guidance_network_without_its_lora(toy_guidance: Any) -> None:
    x, t, labels = torch.randn(3, 1, 2, 2), torch.rand(3), torch.arange(3)
    asked = Teacher(toy_guidance)(x, t, class_labels=labels)
    assert not torch.equal(asked, toy_guidance(x, t, labels))
    with torch.no_grad():
        toy_guidance.change.zero_()
    assert torch.equal(asked, toy_guidance(x, t, labels))


def test_every_grid_step_is_trained(make_trainer: Callable[..., Trainer]) -> None:
    """The cases above are worth something only if their samples stand at different times."""
    trainer = make_trainer(optim__batch_size=400, rollout={"steps": 4})
    chosen = trainer.rollouts.choose_steps(trainer.micro_batches("generator", 5)[0])
    counts = torch.bincount(chosen, minlength=4)
    assert len(counts) == 4
    assert (counts - 100).abs().max() < 35  # four standard deviations


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_3_asks_the_generator_equally_often_on_every_process(
    make_trainer: Callable[..., Trainer], stage: int
) -> None:
    trainer = make_trainer(optim__batch_size=1, optim__zero_stage=stage, rollout={"steps": 4})
    generator, asked = trainer.generator, []

    def count(*inputs: Any) -> Tensor:
        asked.append(inputs)
        return generator(*inputs)

    trainer.rollouts.generator = lambda x, t, class_labels: count(x, t, class_labels)
    counts = set()
    for update in range(12):
        (draws,) = trainer.micro_batches("generator", update)
        asked.clear()
        draw(trainer, draws)
        assert len(asked) == (4 if stage == 3 else trainer.rollouts.choose_steps(draws).item() + 1)
        counts.add(len(asked))
    assert counts == ({4} if stage == 3 else {1, 2, 3, 4})


def test_jittered_guidance_is_one_number_per_update(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(guidance={"cfg": 3.0, "cfg_jitter": 0.5})
    updates = [Draws(7, ("generator", k), range(2)) for k in range(200)]
    scales = [trainer.guide.cfg(draws) for draws in updates]
    assert 2.5 <= min(scales) < 2.55 < 3.45 < max(scales) <= 3.5
    assert scales[3] == trainer.guide.cfg(Draws(7, ("generator", 3), range(2, 4)))  # on every process

    loss, _, _ = generator_loss(trainer, trainer.micro_batches("generator", 3)[0])
    by_hand = [ByHand(trainer, "generator", 3, i).distribution_matching_loss(scales[3]) for i in range(4)]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", [0, 2, 3, 9])
def test_objectives_join_at_their_start(make_trainer: Callable[..., Trainer], step: int) -> None:
    matching = {"kind": "distribution_matching", "weight": 2.0}
    trainer = make_trainer(objectives=[matching, REFL], step=step)
    samples = [ByHand(trainer, "generator", step, i) for i in range(4)]
    expected = 2.0 * torch.stack([sample.distribution_matching_loss(1.0) for sample in samples]).mean()
    if step >= 3:
        expected = expected + 0.3 * torch.stack([sample.refl_loss(0.9) for sample in samples]).mean()
    expected.backward()
    slope = gradients(trainer.generator)
    zero(trainer.generator)

    loss, logs, _ = generator_loss(trainer, trainer.micro_batches("generator", step)[0])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(trainer.generator), slope, rtol=1e-4, atol=1e-6)
    assert ("loss/refl" in logs) == ("reward/toy" in logs) == (step >= 3)


def test_several_objectives_match_distributions_with_one_fake_score(make_trainer: Callable[..., Trainer]) -> None:
    matching = {"kind": "distribution_matching", "weight": 0.5}
    one, two = make_trainer(), make_trainer(objectives=[matching, matching])
    draws = one.micro_batches("generator", 0)[0]
    (alone, _, _), (both, _, _) = (generator_loss(trainer, draws) for trainer in (one, two))
    assert both.item() == pytest.approx(alone.item(), rel=1e-6)
    two.guide.engine = Engine("F", two.guidance, calls := [])
    two.generator = Engine("G", two.generator, [])
    two.train_step()
    assert calls == ["F backward", "F step"] * two.settings.guidance.ratio


def test_a_reward_above_its_margin_pulls_no_more(make_trainer: Callable[..., Trainer]) -> None:
    refl = {**REFL, "margin": -5.0, "start": 0}
    with_reward = make_trainer(objectives=[{"kind": "distribution_matching"}, refl])
    without = make_trainer()
    (first, logs, _), (second, _, _) = (
        generator_loss(trainer, trainer.micro_batches("generator", 0)[0]) for trainer in (with_reward, without)
    )
    assert logs["loss/refl"] == 0
    assert first.item() == second.item()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 4), (12, 1)])
def test_micro_batches_partition_the_batch(make_trainer: Callable[..., Trainer], world: int, accumulation: int) -> None:
    settings = {"optim__batch_size": 12, "optim__accumulation": accumulation}
    parts = [
        part for rank in range(world) for part in make_trainer(rank, world, **settings).micro_batches("fake_score", 2)
    ]
    assert len(parts) == world * accumulation
    assert {len(part.samples) for part in parts} == {12 // (world * accumulation)}
    assert sorted(i for part in parts for i in part.samples) == list(range(12))
    assert {(part.seed, part.update) for part in parts} == {(7, ("fake_score", 2))}


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_split_of_a_batch_does_not_change_the_losses(
    make_trainer: Callable[..., Trainer], world: int, accumulation: int
) -> None:
    refl = {**REFL, "start": 0}
    settings: dict[str, Any] = {"objectives": [{"kind": "distribution_matching"}, refl], **CASES["all"]}
    whole = make_trainer(**settings)
    trainers = [make_trainer(r, world, optim__accumulation=accumulation, **settings) for r in range(world)]
    for update in ("generator", "fake_score"):

        def loss(trainer: Trainer, draws: Draws, update: str = update) -> Tensor:
            return fake_score_loss(trainer, draws) if update == "fake_score" else generator_loss(trainer, draws)[0]

        parts = [loss(t, draws) for t in trainers for draws in t.micro_batches(update, 4)]
        assert len(parts) == 4
        together = loss(whole, whole.micro_batches(update, 4)[0])
        torch.testing.assert_close(torch.stack(parts).mean(), together, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_gradient_norms_at_x0_are_of_the_global_batch(
    make_trainer: Callable[..., Trainer], world: int, accumulation: int
) -> None:
    """|∂L/∂x0| of both objectives by hand, whatever the split; and the automatic weight that follows."""
    automatic = {**REFL, "start": 0, "weight": "auto", "ratio": 0.5}
    settings: dict[str, Any] = {"objectives": [{"kind": "distribution_matching"}, automatic], "optim__batch_size": 4}
    trainers = [make_trainer(r, world, optim__accumulation=accumulation, **settings) for r in range(world)]
    samples = [ByHand(trainers[0], "generator", 0, i) for i in range(4)]
    expected = {}
    for name, loss in (
        ("distribution_matching", lambda s: s.distribution_matching_loss(1.0)),
        ("refl", lambda s: s.refl_loss(0.9)),
    ):
        x0s = [s.x0().detach().requires_grad_() for s in samples]
        for s, x0 in zip(samples, x0s, strict=True):
            s.x0 = lambda x0=x0: x0  # type: ignore[method-assign]
        torch.stack([loss(s) for s in samples]).mean().backward()
        expected[name] = torch.stack([x0.grad for x0 in x0s]).norm().item()

    squares = [dict.fromkeys(expected, 0.0) for _ in trainers]
    for trainer, mine in zip(trainers, squares, strict=True):
        for draws in trainer.micro_batches("generator", 0):
            for name, gradient in generator_loss(trainer, draws)[2].items():
                mine[name] += gradient.square().sum().item()
    for trainer in trainers:
        trainer.mean = lambda values: {name: sum(s[name] for s in squares) / world for name in values}
        found = trainer.balance(dict(squares[0]))
        assert found == pytest.approx(expected, rel=1e-5)
        ratio = 0.5 * expected["distribution_matching"] / expected["refl"]
        assert trainer.objectives[1].weight.at(1) == pytest.approx(ratio, rel=1e-5)


class Engine:
    """A module that counts what an engine is asked for."""

    def __init__(self, name: str, module: Any, calls: list[str]):
        self.name, self.module, self.calls = name, module, calls

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        return self.module(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        self.calls.append(f"{self.name} backward")
        loss.backward()

    def step(self) -> None:
        self.calls.append(f"{self.name} step")


class Mute(Engine):
    """An engine that keeps its gradients, and has nothing to update."""

    def __init__(self, module: Any):
        super().__init__("", module, [])


@pytest.mark.parametrize("parts", [1, 4])
def test_what_an_update_does_is_the_mean_over_its_micro_batches(
    make_trainer: Callable[..., Trainer], parts: int
) -> None:
    """The losses that are logged, and the gradient that comes to the networks."""
    settings: dict[str, Any] = {"objectives": [{"kind": "distribution_matching"}, {**REFL, "start": 0}]}
    whole, split = (make_trainer(optim__accumulation=parts, **settings) for parts in (1, parts))
    expected = fake_score_loss(whole, whole.micro_batches("fake_score", 0)[0])
    expected.backward()
    fake_slope = gradients(whole.guidance)
    zero(whole.guidance)
    loss, values, slopes = generator_loss(whole, whole.micro_batches("generator", 0)[0])
    loss.backward()
    slope = gradients(whole.generator)
    zero(whole.generator)

    split.generator, split.guide.engine = Mute(split.generator), Mute(split.guidance)
    logs = split.read([split.update_fake_score(0)], [])
    assert logs == {"loss/fake_score": pytest.approx(expected.item(), rel=1e-5)}
    torch.testing.assert_close(gradients(split.guidance.module) / parts, fake_slope, rtol=1e-4, atol=1e-6)
    logs, (values,) = split.read([], split.update_generator()), numbers([values])
    norms = {f"grad_norm/{name}": each.norm().item() for name, each in slopes.items()}
    assert logs == pytest.approx({**values, **norms}, rel=1e-5)
    torch.testing.assert_close(gradients(split.generator.module) / parts, slope, rtol=1e-4, atol=1e-6)
    assert split.trouble == []


def test_an_infinite_loss_poisons_its_update_and_names_its_prompts(make_trainer: Callable[..., Trainer]) -> None:
    """Also where its gradient is finite, as that of a sum with infinity is."""
    trainer = make_trainer(optim__accumulation=4)
    trainer.generator, trainer.guide.engine = Mute(trainer.generator), Mute(trainer.guidance)
    loss_of, matching = trainer.guide.loss, trainer.objectives[0]

    def broken(loss: Tensor, draws: Draws) -> Tensor:
        return loss + (math.inf if 2 in draws.samples else 0)

    trainer.guide.loss = lambda sample: broken(loss_of(sample), sample.draws)  # type: ignore[method-assign]
    trainer.read([trainer.update_fake_score(0)], [])
    prompts = trainer.rollouts.prompts.draw(trainer.micro_batches("fake_score", 0)[2])
    assert trainer.trouble == [("fake_score", prompts)]
    assert gradients(trainer.guidance.module).isnan().all()

    class Broken(type(matching)):  # type: ignore[misc]
        def __call__(self, sample: Any, guide: Any) -> Any:
            loss, values = super().__call__(sample, guide)
            return broken(loss, sample.draws), values

    matching.__class__ = Broken
    trainer.trouble = []
    trainer.read([], trainer.update_generator())
    prompts = trainer.rollouts.prompts.draw(trainer.micro_batches("generator", 0)[2])
    assert trainer.trouble == [("distribution_matching", prompts)]
    assert gradients(trainer.generator.module).isnan().all()


class Counted(torch.autograd.Function):
    """The identity, which counts the backward passes through it."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        Counted.passes += 1
        return slope


@pytest.mark.parametrize(
    ("rewards", "log_every", "passes"),
    [
        ([0.3], 10, 1),
        ([0.3, 0.2], 10, 1),
        ([0.3, 0.2], 1, 3),  # and one for each norm
        (["auto"], 10, 1),
        (["auto", 0.2], 10, 2),  # the weights need the norms
        (["auto", 0.2], 1, 2),
    ],
)
def test_rewards_share_the_way_from_x0_to_the_pictures(
    make_trainer: Callable[..., Trainer], rewards: list[Any], log_every: int, passes: int
) -> None:
    """Gradients pass the decoder once, unless they are needed apart; the gradient is that of the weighted sum."""
    refl = [{**REFL, "start": 0, "weight": weight, "margin": 0.9 + i} for i, weight in enumerate(rewards)]
    matching = {"kind": "distribution_matching"}
    trainer = make_trainer(objectives=[matching, *refl], tracking__log_every=log_every, watch__every=0)
    trainer.rollouts.decode = lambda sample: Counted.apply(trainer.family.decode(sample.x0))
    for objective in trainer.objectives[1:]:
        objective.weight.own, objective.weight.other = 2.0, 1.0
    sample, Counted.passes = draw(trainer, trainer.micro_batches("generator", 0)[0]), 0
    sample.x0.retain_grad()
    loss, _, norms = trainer.generator_loss(sample)
    assert Counted.passes == passes
    names = [objective.name for objective in trainer.objectives]
    assert list(norms) == (names[:1] if passes < len(rewards) else names)
    loss.backward()
    x0 = sample.x0.detach().requires_grad_()
    expected = torch.zeros_like(x0)
    for objective in trainer.objectives:
        value, _ = objective(replace(sample, x0=x0), trainer.guide)
        (slope,) = torch.autograd.grad(objective.weight.at(0) * value, x0)
        expected += slope
    torch.testing.assert_close(sample.x0.grad, expected, rtol=1e-5, atol=1e-8)


def test_what_is_logged_does_not_change_the_gradient(make_trainer: Callable[..., Trainer]) -> None:
    rewards = [{**REFL, "start": 0, "margin": margin} for margin in (0.9, 1.3)]
    slopes = []
    for log_every in (1, 10):
        trainer = make_trainer(objectives=[{"kind": "distribution_matching"}, *rewards], tracking__log_every=log_every)
        generator_loss(trainer, trainer.micro_batches("generator", 0)[0])[0].backward()
        slopes.append(gradients(trainer.generator))
        zero(trainer.generator)
    assert torch.equal(*slopes)


def test_a_loss_that_depends_on_nothing_is_named(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()

    class Constant(DistributionMatching):
        def __call__(self, sample: Any, guide: Any) -> Any:
            return torch.ones((), requires_grad=True) * 2, {}

    trainer.objectives[0].__class__ = Constant
    with pytest.raises(RuntimeError, match="the loss of distribution_matching depends neither on x0 nor on the pict"):
        generator_loss(trainer, trainer.micro_batches("generator", 0)[0])


def test_the_order_of_a_step(make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    """`ratio` updates of the fake score, each on samples of its own, then one of the generator."""
    trainer = make_trainer(guidance__ratio=3, optim__accumulation=2)
    calls: list[str] = []
    asked: list[tuple[str, int]] = []
    trainer.generator = Engine("G", trainer.generator, calls)
    trainer.guide.engine = Engine("F", trainer.guidance, calls)
    micro_batches = trainer.micro_batches

    def spy(update: str, number: int) -> list[Draws]:
        asked.append((update, number))
        return micro_batches(update, number)

    monkeypatch.setattr(trainer, "micro_batches", spy)
    seeded: list[tuple[int, ...]] = []
    monkeypatch.setattr("dmdr_train.training.trainer.seed_others", lambda *name: seeded.append(name))
    for _ in range(2):
        logs = trainer.train_step()
    once = ["F backward", "F step"] * 6 + ["G backward", "G step"] * 2
    assert calls == once * 2
    fake = [("fake_score", i) for i in range(6)]
    assert asked == [*fake[:3], ("generator", 0), *fake[3:], ("generator", 1)]
    assert trainer.step == 2
    assert seeded == [(7, 0, 0), (7, 1, 0)]  # seed, step and rank
    assert {"loss/fake_score", "loss/distribution_matching", "teacher_scale"} <= logs.keys()


# -- one rollout for a step

STEPS = 4
REUSE = {"rollout": {"steps": STEPS, "shift": 3.0}, "optim__batch_size": 8, "guidance__ratio": STEPS, "step": 3}


def reusing(reuse: str, **settings: Any) -> dict[str, Any]:
    return {**REUSE, "rollout": {**REUSE["rollout"], "reuse": reuse}, **settings}


def muted(trainer: Trainer) -> Trainer:
    """The same trainer, whose networks keep their gradients and their weights."""
    trainer.generator, trainer.guide.engine = Mute(trainer.generator), Mute(trainer.guidance)
    return trainer


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("reuse", ["sample", "states"])
def test_the_fake_score_learns_from_the_generators_rollout_with_fresh_noise(
    make_trainer: Callable[..., Trainer], reuse: str, mode: str
) -> None:
    """`sample`: x0 of the generator's own update; `states`: in turn x0 of all states that its rollout visits."""
    trainer = make_trainer(**reusing(reuse, rollout={**REUSE["rollout"], "reuse": reuse, "mode": mode}))
    loss, _, _ = generator_loss(trainer, trainer.micro_batches("generator", 3)[0])
    own = [ByHand(trainer, "generator", 3, i) for i in range(8)]
    by_hand = torch.stack([sample.distribution_matching_loss(1.0) for sample in own]).mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=0)
    trained, seen = [sample.position for sample in own], []
    for number in range(3 * STEPS, 4 * STEPS):
        expected = []
        for i, sample in enumerate(own):
            update = ByHand(trainer, "fake_score", number, i)  # whose noise it is
            if reuse == "states":
                sample.position = (trained[i] + number + 1) % STEPS
                seen.append((i, sample.position))
            update.label, update.x0 = sample.label, sample.x0  # type: ignore[method-assign]
            expected.append(update.fake_score_loss())
        (draws,) = trainer.micro_batches("fake_score", number)
        found = trainer.guide.loss(trainer.rollouts.draw_for_fake_score(draws, 3))
        torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-5, atol=0)
    assert len(set(seen)) == len(seen) == (8 * STEPS if reuse == "states" else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rollout__reuse": "sample"},
        {"rollout__reuse": "states"},
        {"rollout__mode": "ode"},
        {"rollout__states": "authors"},
        {"rollout__states": "authors", "rollout__mode": "ode"},
        {"optim__zero_stage": 3},
        {"optim__zero_stage": 3, "rollout__reuse": "sample", "guidance__cfg": 2.0},
        {"rollout__reuse": "sample", "guidance__cfg": 2.0, "guidance__cfg_jitter": 0.5},
    ],
)
def test_how_often_a_step_asks_the_networks(make_trainer: Callable[..., Trainer], changes: dict[str, Any]) -> None:
    """Predictions of single samples in all micro-batches, as `predictions` says; texts are encoded once with reuse."""
    rollout = {**REUSE["rollout"], "positions": "stratified"}
    trainer = muted(make_trainer(**{**REUSE, "rollout": rollout, "optim__accumulation": 2, **changes}))
    asked, family = Counter[str](), trainer.family
    condition, predict, encoded = family.condition, family.predict, []

    def counted(network: Any, x_t: Tensor, *rest: Any, **named: Any) -> Tensor:
        role = (
            "generator" if network is trainer.rollouts.generator else "fake_score" if named["lora_scale"] else "teacher"
        )
        asked[role + " trained" * torch.is_grad_enabled()] += len(x_t)
        return predict(network, x_t, *rest, **named)

    family.predict = counted  # type: ignore[method-assign]
    family.condition = lambda prompts: encoded.append(len(prompts)) or condition(prompts)  # type: ignore
    trainer.train_step()
    assert asked == {role: 8 * count for role, count in predictions(trainer.settings).items()}
    assert sum(encoded) == (8 if "rollout__reuse" in changes else 8 * (STEPS + 1))


@pytest.mark.parametrize("reuse", ["sample", "states"])
def test_reuse_comes_to_the_generator_first_and_leaves_no_graph(
    make_trainer: Callable[..., Trainer], reuse: str
) -> None:
    trainer = make_trainer(**reusing(reuse, optim__accumulation=2))
    calls: list[str] = []
    trainer.generator = Engine("G", trainer.generator, calls)
    trainer.guide.engine = Engine("F", trainer.guidance, calls)
    learn = trainer.guide.learn

    def spy(sample: Sample) -> Any:
        assert not any(x.requires_grad for x in (sample.x0, sample.x_t, sample.next_state))
        return learn(sample)

    trainer.guide.learn = spy  # type: ignore[method-assign]
    trainer.train_step()
    assert calls == ["G backward", "G step"] * 2 + ["F backward", "F step"] * (2 * STEPS)
    with pytest.raises(RuntimeError, match="samples that are kept are of step 3, not of 4"):
        trainer.update_fake_score(16)


@pytest.mark.parametrize("reuse", ["sample", "states"])
@pytest.mark.parametrize(("world", "accumulation"), [(1, 8), (2, 1), (2, 2)])
def test_reuse_depends_neither_on_the_split_of_a_batch_nor_on_earlier_steps(
    make_trainer: Callable[..., Trainer], reuse: str, world: int, accumulation: int
) -> None:
    """Gradients of a whole step, of one that others came before, of one that is split, are the same."""
    whole = muted(make_trainer(**reusing(reuse)))
    whole.train_step()
    expected = gradients(whole.generator.module), gradients(whole.guidance.module)
    found = [torch.zeros_like(each) for each in expected]
    networks = whole.generator.module, whole.guidance.module
    for rank in range(world):
        part = make_trainer(rank, world, **reusing(reuse, step=2, optim__accumulation=accumulation))
        part = muted(part)
        part.train_step()
        zero(*networks)
        part.train_step()
        for each, network in zip(found, networks, strict=True):
            each += gradients(network) / (world * accumulation)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
