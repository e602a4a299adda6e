"""The discriminator: what it learns, where gradients flow, what a checkpoint keeps, what goes together."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_core import discriminator_loss, randn
from dmdr_models.drawing.sampling import sample
from dmdr_models.networks.features import MiddleFeatures
from dmdr_train.checkpoint.load import load_checkpoint
from dmdr_train.checkpoint.save import Saving
from dmdr_train.distributed import collectives
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.objectives.adversarial import Adversarial, AdversarialSection
from dmdr_train.objectives.distribution_matching import DistributionMatching, DistributionMatchingSection
from dmdr_train.recipe.schema import Recipe
from dmdr_train.recipe.step_work import predictions
from dmdr_train.run.build import build
from dmdr_train.training.discriminator import Head
from dmdr_train.training.trainer import Trainer
from torch import Tensor, nn

CPU = torch.device("cpu")
HEAD: dict[str, Any] = {"teacher_steps": 2, "width": 8, "lr": 0.05}
OBJECTIVES = [{"kind": "distribution_matching", "divergence": "jeffreys"}, {"kind": "adversarial", "weight": 0.5}]


@pytest.fixture
def make_trainer(make_recipe: Callable[..., Recipe], model: Path, one_process: None) -> Callable[..., Trainer]:
    def make(**changes: Any) -> Trainer:
        basis: dict[str, Any] = {"model__path": str(model), "objectives": OBJECTIVES, "optim__batch_size": 4}
        return build(make_recipe(**{**basis, "guidance": {"ratio": 1, "discriminator": HEAD}, **changes}), CPU)

    return make


def sample_of(trainer: Trainer) -> Any:
    (draws,) = trainer.micro_batches("generator", trainer.step)
    return trainer.rollouts.draw(draws, trainer.step, trainer.needs())


def opinionated(trainer: Trainer) -> None:
    """A head whose logits are not 0."""
    with torch.no_grad():
        trainer.guide.discriminator.head.logit.weight.normal_(generator=torch.Generator().manual_seed(5))


def trained(engine: Any) -> list[nn.Parameter]:
    return [p for p in engine.module.parameters() if p.requires_grad]


# -- what it learns


def test_the_head_learns_the_log_ratio_of_two_gaussians() -> None:
    """p = N((1, 0), I) and q = N((−1, 0), I) in two dimensions: log p/q = 2·x."""
    generator = torch.Generator().manual_seed(0)
    head = Head(2, 32, generator)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    shift = torch.tensor([1.0, 0.0])
    for _ in range(300):
        real, fake = (torch.randn(256, 1, 2, generator=generator) + sign * shift for sign in (1, -1))
        optimizer.zero_grad()
        discriminator_loss("logistic", head(real), head(fake)).backward()
        optimizer.step()
    x = torch.tensor([[-1.5, 0.4], [-0.7, -1.0], [0.0, 0.0], [0.6, 1.0], [1.4, -0.3]])
    assert (head(x[:, None]) - 2 * x[:, 0]).abs().max() < 0.7


def test_a_new_head_has_no_opinion() -> None:
    assert torch.equal(Head(3, 4, torch.Generator())(torch.randn(2, 5, 3)), torch.zeros(2))


def test_a_step_trains_it_and_the_weights_follow(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    before = trainer.guide.state_dict()
    first, second = trainer.train_step(), trainer.train_step()
    after = trainer.guide.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert first["divergence_weight/distribution_matching"] == pytest.approx(1.0)
    assert second["divergence_weight/distribution_matching"] != 1.0
    assert first["loss/discriminator"] == pytest.approx(2 * torch.tensor(2.0).log().item())
    assert {"loss/adversarial", "logit/adversarial", "discriminator/real", "discriminator/fake"} <= second.keys()


# -- where gradients flow


def test_the_reward_has_the_gradient_of_its_values(make_trainer: Callable[..., Trainer]) -> None:
    """The slope of the logit at x0, through the frozen network, against a finite difference."""
    trainer = make_trainer()
    opinionated(trainer)
    drawn = sample_of(trainer)
    x0 = drawn.x0.detach().requires_grad_()
    (slope,) = torch.autograd.grad(trainer.guide.logit(replace(drawn, x0=x0)).sum(), x0)
    way = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    way = way * 0.05 / way.abs().max() + 0.02 * slope / slope.abs().max()
    with torch.no_grad():
        ahead, behind = (trainer.guide.logit(replace(drawn, x0=x0 + sign * way)).sum() for sign in (1, -1))
    assert (slope * way).sum().item() == pytest.approx((ahead - behind).item() / 2, rel=0.05)
    assert slope.abs().max() > 0


def test_the_reward_is_taken_where_distributions_are_matched(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    opinionated(trainer)
    drawn = sample_of(trainer)
    at = trainer.guide.renoise(drawn)
    torch.testing.assert_close(trainer.guide.discriminator.noisy(drawn, at.t), at.x_t)
    torch.testing.assert_close(trainer.guide.logit(drawn), trainer.guide.log_ratio(drawn, at))


def test_the_head_may_have_noise_levels_of_its_own(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beta(1, 1999) has the mean 1/2000: the term and the head see samples almost without noise, matching does not."""
    guidance = {"ratio": 1, "discriminator": {**HEAD, "renoise": {"alpha": 1.0, "beta": 1999.0}}}
    trainer = make_trainer(objectives=[{"kind": "distribution_matching"}, OBJECTIVES[1]], guidance=guidance)
    discriminator, seen = trainer.guide.discriminator, []
    features = discriminator.features
    monkeypatch.setattr(discriminator, "features", lambda x, t, c: seen.append(t.detach()) or features(x, t, c))
    drawn = sample_of(trainer)
    trainer.train_step()
    assert len(seen) == 3  # of the generator's term, and of fake and real samples
    assert all(torch.equal(t, seen[0]) for t in seen)
    assert 0 < seen[0].max() < 0.02
    assert trainer.guide.renoise(drawn).t.max() > 0.1


@pytest.mark.parametrize("stage", [0, 2])
def test_the_generators_term_trains_the_generator_alone(make_trainer: Callable[..., Trainer], stage: int) -> None:
    trainer = make_trainer(objectives=OBJECTIVES[1:], optim__zero_stage=stage)
    opinionated(trainer)
    start = {name: value.clone() for name, value in trainer.guide.state_dict().items()}
    weights = [p.detach().clone() for p in trained(trainer.generator)]
    loss, _, gradients = trainer.generator_loss(sample_of(trainer))
    trainer.generator.backward(loss)
    trainer.generator.step()
    assert gradients["adversarial"].abs().max() > 0
    assert not any(map(torch.equal, weights, trained(trainer.generator)))
    assert all(p.grad is None for p in trained(trainer.guidance))
    assert all(p.grad is None for p in trainer.guide.discriminator.head.parameters())
    assert all(torch.equal(value, start[name]) for name, value in trainer.guide.state_dict().items())


def test_the_head_trains_itself_alone(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    values = trainer.guide.learn_beside(sample_of(trainer), {"discriminator"})
    assert not any(value.requires_grad for value in values.values())
    assert any(gradient.abs().max() > 0 for gradient in trainer.guide.discriminator.gradients)
    for engine in (trainer.generator, trainer.guidance):
        assert all(p.grad is None for p in trained(engine))
    assert trainer.guide.learn_beside(sample_of(trainer), set()) == {}


def test_a_split_batch_gives_the_same_head(make_trainer: Callable[..., Trainer]) -> None:
    heads = []
    for accumulation in (1, 2):
        trainer = make_trainer(optim__accumulation=accumulation)
        trainer.train_step()
        heads.append(trainer.guide.state_dict())
    for name, value in heads[0].items():
        torch.testing.assert_close(heads[1][name], value, rtol=1e-3, atol=1e-5)


def test_it_tells_real_from_generated_after_some_updates(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    drawn, discriminator = sample_of(trainer), trainer.guide.discriminator
    seen = []
    for _ in range(12):
        seen.append(trainer.guide.learn_beside(replace(drawn, x0=drawn.x0 + 5), {"discriminator"}))
        discriminator.update()
    assert seen[-1]["loss/discriminator"] < seen[0]["loss/discriminator"] - 0.1
    assert seen[-1]["discriminator/real"] > seen[-1]["discriminator/fake"] + 0.1


def test_the_penalty_has_its_weight(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    opinionated(trainer)
    drawn, discriminator, found = sample_of(trainer), trainer.guide.discriminator, []
    for weight in (0.0, 1.0, 3.0):
        discriminator.settings = discriminator.settings.model_copy(update={"r1": weight})
        trainer.guide.learn_beside(drawn, {"discriminator"})
        found.append(discriminator.gradients)
        discriminator.gradients, discriminator.batches = [], 0
    for none, one, three in zip(*found, strict=True):
        torch.testing.assert_close(three - none, 3 * (one - none), rtol=1e-3, atol=1e-5)
    assert any((one - none).abs().max() > 1e-3 for none, one, _ in zip(*found, strict=True))


def test_real_samples_are_the_teachers_own(make_trainer: Callable[..., Trainer]) -> None:
    """Of the generator's prompts, with its guidance, whatever the fake score has learned; as `sample` draws them."""
    guidance = {"ratio": 1, "cfg": 1.5, "teacher_cfg": 2.0, "discriminator": HEAD}
    trainer = make_trainer(guidance=guidance, rollout={"shift": 2.0})
    trainer.train_step()
    drawn = sample_of(trainer)
    found, condition = trainer.guide.discriminator.real(drawn)
    noise = randn(drawn.x0.shape, drawn.draws.each("teacher"))
    teacher = trainer.family.load_network()
    expected = sample(trainer.family, teacher, drawn.condition, noise, 2, "euler", 2.0, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert condition is drawn.condition


def test_real_samples_may_be_stored(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    drawn, discriminator = sample_of(trainer), trainer.guide.discriminator
    target = torch.randn(drawn.x0.shape)
    discriminator.settings = discriminator.settings.model_copy(update={"teacher_steps": None})
    discriminator.stored = SimpleNamespace(real=lambda draws: ([1, 2, 3, 0], target))
    found, condition = discriminator.real(drawn)
    assert found is target
    assert condition["class_labels"].tolist() == [1, 2, 3, 0]


def test_a_gradient_that_is_not_finite_is_no_step(make_trainer: Callable[..., Trainer]) -> None:
    discriminator = make_trainer().guide.discriminator
    before = discriminator.state_dict()
    discriminator.gradients = [torch.full_like(p, float("inf")) for p in discriminator.parameters.values()]
    discriminator.batches = 1
    discriminator.update()
    assert all(torch.equal(value, before[name]) for name, value in discriminator.state_dict().items())
    assert discriminator.batches == 0


def test_gradients_are_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    others = torch.tensor([3.0, 5.0])
    fake = SimpleNamespace(
        get_world_size=lambda: 2, get_backend=lambda: "gloo", all_reduce=lambda total: total.add_(others)
    )
    monkeypatch.setattr(collectives, "dist", fake)
    own = torch.tensor([1.0, 1.0])
    assert torch.equal(collectives.mean_tensor_over_processes(own), torch.tensor([2.0, 3.0]))
    assert torch.equal(own, torch.ones(2))


# -- density ratios


def test_samples_are_weighted_by_their_ratio(make_trainer: Callable[..., Trainer]) -> None:
    """Jeffreys: (1 + r)/2, with r the exponential of the logit."""
    trainer = make_trainer()
    trainer.train_step()  # before, the fake score is the teacher
    opinionated(trainer)
    drawn = sample_of(trainer)
    logit = trainer.guide.log_ratio(drawn, trainer.guide.renoise(drawn)).clamp(-torch.tensor(10.0).log(), None)

    def slope(divergence: str) -> Tensor:
        settings = DistributionMatchingSection(kind="distribution_matching", divergence=divergence)
        x0 = drawn.x0.detach().requires_grad_()
        loss, _ = DistributionMatching(settings, "dm")(replace(drawn, x0=x0), trainer.guide)
        return torch.autograd.grad(loss, x0)[0]

    expected = (0.5 + 0.5 * logit.exp()).reshape(-1, 1, 1, 1) * slope("reverse_kl")
    torch.testing.assert_close(slope("jeffreys"), expected, rtol=1e-4, atol=1e-9)
    assert not torch.equal(slope("forward_kl"), slope("jensen_shannon"))


# -- checkpoints


def test_a_resumed_run_has_the_same_discriminator(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train_step()
    path = Saving(tmp_path, trainer.settings, trainer, Average(trainer.generator, None)).finish()
    again = make_trainer()
    load_checkpoint(path, again, Average(again.generator, None))
    for each in (trainer, again):
        each.train_step()
    expected = trainer.guide.state_dict()
    assert expected["step.logit.bias"] == 2
    assert all(torch.equal(value, expected[name]) for name, value in again.guide.state_dict().items())


# -- features


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :1], 2 * x


class Blocks(nn.Module):
    _no_split_modules = ("Two",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Two() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[1]
        return x


def test_the_features_of_the_middle_block() -> None:
    network, x = Blocks(), torch.randn(2, 5, 4)
    with MiddleFeatures(network) as features:
        network(x)
        assert torch.equal(features.tokens(), 4 * x)
    network(x)
    assert features.output is None
    unet = nn.Sequential()
    unet.add_module("mid_block", nn.Conv2d(3, 6, 1))
    with MiddleFeatures(unet) as features:
        out = unet(torch.randn(2, 3, 4, 5))
        assert torch.equal(features.tokens(), out.permute(0, 2, 3, 1).reshape(2, 20, 6))
    with pytest.raises(ValueError, match="Linear names no repeated blocks, whose features could be read"):
        MiddleFeatures(nn.Linear(2, 2))


# -- recipes


def test_what_a_step_asks(make_recipe: Callable[..., Recipe]) -> None:
    without = predictions(make_recipe())
    with_it = predictions(make_recipe(objectives=OBJECTIVES, guidance={"ratio": 2, "discriminator": HEAD}))
    assert {role: with_it[role] - without[role] for role in with_it} == {
        "generator": 0, "generator trained": 0, "fake_score": 0, "fake_score trained": 0, "teacher": 2 + 1 + 2 + 2,
    }  # fmt: skip
    guided = {"ratio": 2, "teacher_cfg": 2.0, "discriminator": HEAD}
    assert predictions(make_recipe(objectives=OBJECTIVES, guidance=guided))["teacher"] == with_it["teacher"] + 2


def test_it_makes_no_stage_of_its_own(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(objectives=[*OBJECTIVES[:1], {**OBJECTIVES[1], "start": 5}], guidance={"discriminator": HEAD})
    assert recipe.stages == {"cold_start": 10}
    assert Adversarial(AdversarialSection(kind="adversarial"), "adversarial").needs == {"discriminator"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "guidance.discriminator: is null and distribution_matching needs it; give one, {} for all defaults"),
        (
            {"objectives": [{"kind": "distribution_matching"}], "guidance": {"discriminator": {}}},
            "guidance.discriminator: has no effect without an objective such as adversarial; leave it out",
        ),
        (
            {"guidance": {"discriminator": {"teacher_steps": None}}},
            "guidance.discriminator.teacher_steps: is null without data.pictures or data.pairs, the real .*; give one",
        ),
        (
            {"guidance": {"discriminator": {}}, "optim__zero_stage": 3},
            "guidance.discriminator: does not go with optim.zero_stage 3; use 2, or leave it out",
        ),
        (
            {"guidance": {"discriminator": {}, "renoise_from": "next_state"}, "rollout": {"steps": 2}},
            "objectives.0.divergence: jeffreys compares renoised x0, and guidance.renoise_from is next_state; use x0",
        ),
        (
            {"guidance": {"discriminator": {}}, "memory": {"compile": True}},
            "memory.compile: true does not go with guidance.discriminator, .*; use false",
        ),
        (
            {"guidance": {"discriminator": {"loss": "hinge"}}},
            "guidance.discriminator.loss: hinge gives no density ratio, which objectives.0.divergence jeffreys needs; "
            "use logistic",
        ),
        (
            {"guidance": {"discriminator": {"renoise": {"alpha": 1.0, "beta": 4.0}}}},
            "guidance.discriminator.renoise: has other noise levels than objectives.0.divergence jeffreys compares",
        ),
        (
            {"objectives": [OBJECTIVES[0], {**OBJECTIVES[1], "ratio": 2.0}], "guidance": {"discriminator": {}}},
            "objectives.1.ratio: 2.0 has no effect beside a given weight; set weight: auto",
        ),
    ],
)
def test_what_does_not_go_together(make_recipe: Callable[..., Recipe], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(**{"objectives": OBJECTIVES, **changes})
