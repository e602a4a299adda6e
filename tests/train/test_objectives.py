"""Rewards as objectives, what they see, and their weights; formulas are written out by hand."""

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_rewards import RewardInfo, TowerReward
from dmdr_rewards.prompts.text_cache import TextCache
from dmdr_train.base.random_draws import Draws
from dmdr_train.objectives.distribution_matching import DistributionMatching, DistributionMatchingSection
from dmdr_train.objectives.from_recipe import make_reward
from dmdr_train.objectives.refl import ReFL, ReFLSection
from dmdr_train.objectives.srpo import SRPO, SRPOSection
from dmdr_train.recipe import schema
from dmdr_train.training.guide import Guide
from dmdr_train.training.loss_weight import Weight
from dmdr_train.training.reward_view import View
from dmdr_train.training.sample import Sample
from torch import Tensor

REWARD = schema.Reward(name="toy", checkpoint="there")
NO_GUIDE: Any = None  # rewards need no guide


class Reader:
    """A reward that likes pictures the more, the longer the text is; it remembers what it read."""

    def __init__(self) -> None:
        self.info = RewardInfo("toy", "", (-9.0, 9.0), "", "", "text", True, None, "")
        self.read: list[str] = []

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.read += prompts
        return images.flatten(1).mean(dim=1) * torch.tensor([float(len(text)) for text in prompts]) / 10


def sample(update: int = 3, samples: Sequence[int] = (0, 1)) -> Sample:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(len(samples), 1, 2, 2, generator=generator).requires_grad_()
    prompts = ["a cat", "a dog in a hat"][: len(samples)]
    return made_of(x0, prompts, Draws(7, ("generator", update), samples), update, lambda s: s.x0 * 1.0)


def made_of(x0: Tensor, prompts: list[Any], draws: Draws, step: int, decode: Any) -> Sample:
    t = torch.ones(len(x0))
    return Sample(x0, prompts, {}, draws, step, x0.detach(), t, t * 0, list(draws.samples), decode, lambda s: s.x0)


def test_refl_reads_the_prompt_in_its_template() -> None:
    reward, made = Reader(), sample()
    settings = ReFLSection(kind="refl", reward=REWARD, margin=0.9, template="Realistic photo {prompt}")
    loss, values = ReFL(settings, "refl", reward)(made, NO_GUIDE)
    assert reward.read == ["Realistic photo a cat", "Realistic photo a dog in a hat"]
    scores = made.x0.flatten(1).mean(dim=1) * torch.tensor([2.1, 3.0])
    torch.testing.assert_close(loss, torch.relu(0.9 - scores).mean())
    past = (scores > 0.9).float().mean().item()
    assert {name: float(value) for name, value in values.items()} == {
        "reward/toy": pytest.approx(scores.mean().item()),
        "past_margin/refl": past,
    }


@pytest.mark.parametrize(("margin", "share"), [(-9.0, 1.0), (9.0, 0.0), (1.0, 0.5)])
def test_the_share_of_rewards_past_their_margin(margin: float, share: float) -> None:
    made = replace(sample(), x0=torch.full((2, 1, 2, 2), 0.8))  # scores 0.8 · 5 / 10 and 0.8 · 14 / 10
    _, values = ReFL(ReFLSection(kind="refl", reward=REWARD, margin=margin), "refl", Reader())(made, NO_GUIDE)
    assert values["past_margin/refl"] == share
    assert not any(value.requires_grad for value in values.values())


def test_a_reward_at_its_margin_is_not_past_it() -> None:
    made = replace(sample(), x0=torch.zeros(2, 1, 2, 2))
    _, values = ReFL(ReFLSection(kind="refl", reward=REWARD, margin=0.0), "refl", Reader())(made, NO_GUIDE)
    assert values["past_margin/refl"] == 0.0
    with pytest.raises(FrozenInstanceError):
        made.step = 1  # type: ignore[misc]


@pytest.mark.parametrize("silent", [0.0, 2.0])
def test_samples_that_a_score_silences_are_counted(toy_family: Any, toy_guidance: Any, silent: float) -> None:
    """A NaN in one entry of a prediction silences its sample; a quarter of the samples, then."""
    settings = DistributionMatchingSection(kind="distribution_matching")
    guidance = schema.Guidance(ratio=1, cfg=2.0)
    made = replace(sample(samples=range(4)), prompts=[0] * 4, condition=toy_family.condition([0] * 4))

    def network(x: Tensor, t: Tensor, class_labels: Tensor, lora_scale: float) -> Tensor:
        prediction = toy_guidance(x, t, class_labels, lora_scale=lora_scale).clone()
        if lora_scale == silent:  # 0 is the teacher's, 2 the fake score's
            prediction[2, 0, 0, 0] = float("nan")
        return prediction

    loss, values = DistributionMatching(settings, "distribution_matching")(made, Guide(guidance, toy_family, network))
    assert {name: float(value) for name, value in values.items()} == {
        "teacher_scale": 0.0,
        "silenced/distribution_matching": 0.25,
    }
    assert loss.isfinite()


def test_the_dynamic_phase_begins_with_the_first_objective(toy_family: Any, toy_guidance: Any) -> None:
    dynamics = schema.Dynamics(steps=10, teacher_scale=0.75)
    guidance = schema.Guidance(ratio=1, dynamics=dynamics, cfg=3.0, cfg_jitter=0.5)
    guide = Guide(guidance, toy_family, toy_guidance, start=4)
    assert [guide.teacher_scale(step) for step in (4, 9, 14, 15)] == pytest.approx([0.75, 0.375, 0.0, 0.0])
    assert isinstance(guide.cfg(sample().draws), float)


def test_srpo_is_what_the_adjective_adds() -> None:
    reward, made = Reader(), sample()
    settings = SRPOSection(kind="srpo", reward=REWARD, margin=2.0, positive=["Detailed"], negative=["Oil"], k=0.3)
    loss, values = SRPO(settings, "srpo", reward)(made, NO_GUIDE)
    brightness = made.x0.flatten(1).mean(dim=1)
    positive = brightness * torch.tensor([float(len("Detailed. a cat")), float(len("Detailed. a dog in a hat"))]) / 10
    negative = brightness * torch.tensor([float(len("Oil. a cat")), float(len("Oil. a dog in a hat"))]) / 10
    score = 1.3 * positive - negative
    torch.testing.assert_close(loss, torch.relu(2.0 - score).mean())
    assert {name: float(value) for name, value in values.items()} == {
        "reward/relative(toy)": pytest.approx(score.mean().item()),
        "past_margin/srpo": 0.0,
    }


def test_the_adjectives_are_one_pair_per_update_on_every_process() -> None:
    settings = SRPOSection(kind="srpo", reward=REWARD, positive=["A", "B", "C"], negative=["X", "Y", "Z"])

    def adjectives(update: int, samples: Sequence[int]) -> set[str]:
        reward = Reader()
        SRPO(settings, "srpo", reward)(sample(update, samples), NO_GUIDE)
        return {text.partition(".")[0] for text in reward.read}

    pairs = [adjectives(update, (0, 1)) for update in range(30)]
    assert all(len(pair) == 2 for pair in pairs)
    assert [adjectives(update, (4, 5)) for update in range(30)] == pairs
    assert set().union(*pairs) == set("ABCXYZ")


def test_pictures_are_decoded_once_for_all_rewards() -> None:
    decoded: list[int] = []

    def decode(made: Sample) -> Tensor:
        decoded.append(1)
        return made.x0 * 1.0

    made = replace(sample(), decode=decode)
    for _ in range(2):
        ReFL(ReFLSection(kind="refl", reward=REWARD), "refl", Reader())(made, NO_GUIDE)
    assert len(decoded) == 1


class Remembering(TowerReward):
    """A reward with a text tower that notes the batches of texts that it embeds."""

    def __init__(self) -> None:
        self.info = Reader().info
        self.batches: list[list[str]] = []
        self.towers = SimpleNamespace(texts=TextCache(self.embed))

    def embed(self, prompts: list[str]) -> Tensor:
        self.batches.append(prompts)
        return torch.ones(len(prompts), 1)


def test_rewards_remember_no_text_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding's last bits depend on its batch, and a resumed run has not met the batches before."""
    monkeypatch.setattr("dmdr_rewards.create", lambda *_, **__: Remembering())
    settings: Any = SimpleNamespace(memory=schema.Memory())
    family: Any = SimpleNamespace(num_classes=None)
    made = make_reward("objectives.0.reward", REWARD, settings, family, torch.device("cpu"))
    for batch in (["a cat", "a dog"], ["a dog", "a bird"]):
        made.towers.texts(batch)
    assert made.batches == [["a cat", "a dog"], ["a dog", "a bird"]]


# -- rewards that fail


class Moody(Reader):
    """Gives no score to the second picture, or no number, or nothing at all."""

    def __init__(self, mood: str) -> None:
        super().__init__()
        self.mood, self.skipped = mood, 0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.mood == "down":
            raise ConnectionError("nobody answers")
        self.skipped += {"skip": 1, "skip all": len(images)}.get(self.mood, 0)
        factor = float("nan") if "skip" in self.mood else float(self.mood)
        factors = torch.tensor([factor if self.mood == "skip all" else 1.0, *[factor] * (len(images) - 1)])
        return super().score(images, prompts) * factors


def moody(mood: str, made: Sample | None = None) -> tuple[ReFL, Tensor, dict[str, float], Tensor]:
    """The objective, its loss, what it logs, and the gradient at x0."""
    made = made or sample()
    term = ReFL(ReFLSection(kind="refl", reward=REWARD, margin=2.0), "refl", Moody(mood))
    loss, values = term(made, NO_GUIDE)
    (slope,) = torch.autograd.grad(loss, made.x0)
    return term, loss.detach(), dict(values), slope


def test_a_picture_without_a_score_is_left_out() -> None:
    first = replace(sample(), x0=sample().x0[:1].detach().requires_grad_(), prompts=["a cat"])
    _, alone, _, slope_alone = moody("1", first)
    term, loss, values, slope = moody("skip")
    assert loss == alone
    assert torch.equal(slope[:1], slope_alone)
    assert not slope[1].any()
    assert (values["unscored/refl"], term.failure) == (0.5, "")
    _, loss, values, slope = moody("skip all")
    assert loss == 0
    assert not slope.any()
    assert values["unscored/refl"] == 1.0


@pytest.mark.parametrize("mood", ["nan", "inf", "-inf"])
def test_a_score_that_is_no_number_is_seen_in_the_loss(mood: str) -> None:
    term, loss, values, _ = moody(mood)
    assert loss.isnan()
    assert (values["unscored/refl"], term.failure) == (0.0, "")


def test_a_reward_that_fails_says_why_and_spoils_the_update() -> None:
    term, loss, _, _ = moody("down")
    assert loss.isnan()
    assert term.failure == "toy of the objective refl: nobody answers"


def test_pictures_that_are_no_numbers_are_not_the_rewards_fault() -> None:
    term, loss, _, _ = moody("1", replace(sample(), x0=torch.full((2, 1, 2, 2), float("nan")).requires_grad_()))
    assert loss.isnan()
    assert term.failure == ""


# -- what rewards see


class Doubling:
    """Decodes every latent to a square of two pixels' side."""

    size = (16, 16)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, height // 2, width // 2

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def latents(samples: Sequence[int]) -> Sample:
    x0 = torch.arange(64.0).reshape(1, 1, 8, 8).expand(len(samples), 1, 8, 8).clone().requires_grad_()
    return made_of(x0, [0] * len(samples), Draws(7, ("generator", 0), samples), 0, lambda s: s.x0)


def test_rewards_see_the_whole_picture_unless_told_otherwise() -> None:
    family: Any = Doubling()
    made = latents([0, 1])
    assert torch.equal(View(family, schema.Memory())(made), family.decode(made.x0))


def test_a_crop_is_a_square_of_the_picture_at_each_samples_own_place() -> None:
    family: Any = Doubling()
    view = View(family, schema.Memory(reward_crop=6))
    made = latents(range(40))
    seen = view(made)
    assert seen.shape == (40, 1, 6, 6)
    corners = seen[:, 0, 0, 0].long()
    for picture, corner in zip(seen, corners.tolist(), strict=True):
        top, left = divmod(corner, 8)
        whole = family.decode(made.x0[:1])[0]
        assert torch.equal(picture, whole[:, 2 * top : 2 * top + 6, 2 * left : 2 * left + 6])
    assert {0, 5} <= set((corners // 8).tolist()) <= set(range(6))
    assert {0, 5} <= set((corners % 8).tolist()) <= set(range(6))
    assert torch.equal(view(latents([7])), seen[7:8])  # whatever the split of the batch
    seen.sum().backward()
    assert made.x0.grad is not None
    assert made.x0.grad.sum() == 40 * 36


def test_a_lower_resolution_is_the_mean_of_latents() -> None:
    family: Any = Doubling()
    seen = View(family, schema.Memory(reward_scale=0.5))(latents([0]))
    assert seen.shape == (1, 1, 8, 8)
    assert seen[0, 0, 0, 0] == (0 + 1 + 8 + 9) / 4


@pytest.mark.parametrize("side", [3, 18])
def test_a_crop_that_cannot_be_is_refused(side: int) -> None:
    family: Any = Doubling()
    with pytest.raises(ValueError, match=f"{side} must be a multiple of 2, at most the resolution 16"):
        View(family, schema.Memory(reward_crop=side))


# -- weights


def refl(**settings: Any) -> Weight:
    return Weight(ReFLSection(kind="refl", reward=REWARD, **settings))


def test_a_weight_holds_from_start_to_stop_and_rises_over_its_ramp() -> None:
    weight = refl(weight=0.8, start=2, stop=7, ramp=3)
    assert [weight.at(step) for step in range(9)] == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0, 0])
    assert [weight.active(step) for step in range(9)] == [False] * 2 + [True] * 5 + [False] * 2


def test_an_automatic_weight_brings_the_gradient_to_its_ratio() -> None:
    weight = refl(weight="auto", ratio=0.5, start=1)
    assert weight.at(1) == 0.0  # nothing is known yet
    weight.observe(own=4.0, other=2.0)
    assert weight.at(2) == pytest.approx(0.5 * 2.0 / 4.0)
    weight.observe(own=2.0, other=6.0)
    assert weight.at(3) == pytest.approx(0.5 * (0.9 * 2 + 0.1 * 6) / (0.9 * 4 + 0.1 * 2))
    before = weight.at(4)
    weight.observe(own=0.0, other=9.0)  # all rewards are past the margin
    weight.observe(own=9.0, other=0.0)  # the fake score is still the teacher
    assert weight.at(4) == before
    assert weight.at(0) == 0.0
    even = refl(weight="auto")
    even.observe(own=4.0, other=2.0)
    assert even.at(1) == 0.5
    for own, other in ((float("inf"), 1.0), (1.0, float("nan"))):  # an update that is skipped
        even.observe(own, other)
    assert (even.own, even.other) == (4.0, 2.0)


def test_a_given_weight_follows_nothing() -> None:
    weight = refl(weight=0.8)
    weight.observe(own=4.0, other=2.0)
    assert (weight.at(1), weight.own, weight.other) == (0.8, 0.0, 0.0)
