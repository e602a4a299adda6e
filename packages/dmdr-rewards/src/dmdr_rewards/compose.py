"""Rewards built from other rewards: a weighted sum, a hinge loss, and a relative reward.

    total, parts = WeightedSum({hps: 1.0, dfn: 0.3})(images, prompts)
    loss = Hinge(dfn, margin=0.7).score(images, prompts).mean()
    srpo = Relative(hps, ["Realistic", "Detailed"], ["Painting", "Oil"], generator=generator)

Each is a `Reward` and can be part of another. Resized pixels and the features of equal towers are computed once for all
parts (`dmdr_rewards.pictures.batch`). Gradients pass through all of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmdr_rewards.interface.info import RewardInfo
from dmdr_rewards.interface.registry import create
from dmdr_rewards.interface.reward import Reward, TowerReward
from dmdr_rewards.pictures.batch import PictureBatch
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.prompts.texts import as_texts


class Weighted(NamedTuple):
    """A weighted sum, float32 Tensor[B], and its unweighted parts by name."""

    total: Tensor
    parts: dict[str, Tensor]


class WeightedSum:
    """Σ weight · reward, together with its parts.

    Parts are named by `info.name`. If several rewards have the same name, the later ones get " 2", " 3" …
    """

    def __init__(self, weights: Mapping[Reward | str, float], **options: Any) -> None:
        """weights: reward -> its factor; a name stands for `create(name, **options)`.

        Raises ValueError for an empty mapping, a weight that is not finite, options if no reward is given by name,
        rewards that take different kinds of prompts, and anything that `create` refuses.
        """
        if not weights:
            raise ValueError("WeightedSum without a reward: give at least one")
        if options and not any(isinstance(given, str) for given in weights):
            raise ValueError(f"options {', '.join(options)} have no effect: no reward is given by its name")
        self.rewards: dict[str, Reward] = {}
        self.weights: dict[str, float] = {}
        for given, weight in weights.items():
            reward = create(given, **options) if isinstance(given, str) else given
            if not math.isfinite(weight):
                raise ValueError(f"weight {weight} of reward {reward.info.name!r}: give a finite number")
            name = _free(reward.info.name, self.rewards)
            self.rewards[name], self.weights[name] = reward, weight
        self.info = _info_of_sum(self.rewards, self.weights)

    def __call__(self, images: "Images | PictureBatch", prompts: Tensor | Sequence[Any]) -> Weighted:
        """B pictures under B prompts -> the sum and its parts, each float32 Tensor[B].

        Errors of the rewards are passed on.
        """
        shared = PictureBatch.of(images)
        parts = {name: _score(reward, shared, prompts) for name, reward in self.rewards.items()}
        total = sum(weight * parts[name] for name, weight in self.weights.items())
        assert isinstance(total, Tensor)
        return Weighted(total, parts)

    def score(self, images: "Images | PictureBatch", prompts: Tensor | Sequence[Any]) -> Tensor:
        """The sum without its parts, float32 Tensor[B]."""
        return self(images, prompts).total


class Hinge:
    """relu(margin − reward), in [0, ∞): the loss of ReFL, per picture. Lower is better.

    The gradient is zero for a picture that reaches the margin. Source: "ImageReward", arXiv 2304.05977; DMDR uses a
    margin of 0.7 for cosines.
    """

    def __init__(self, reward: Reward, margin: float = 0.7) -> None:
        self.reward, self.margin = reward, margin
        low, high = reward.info.range
        self.info = replace(
            reward.info,
            name=f"hinge({reward.info.name})",
            description=f"relu({margin:g} - {reward.info.name}); a loss, lower is better",
            range=(max(margin - high, 0.0), max(margin - low, 0.0)),
        )

    def score(self, images: "Images | PictureBatch", prompts: Tensor | Sequence[Any]) -> Tensor:
        """B pictures under B prompts -> relu(margin − score), float32 Tensor[B]."""
        return F.relu(self.margin - _score(self.reward, PictureBatch.of(images), prompts))


class Relative:
    """(1 + k) · reward(positive prompt) − reward(negative prompt): the effect of an adjective alone.

    Both prompts use the same image features. Source: SRPO, "Directly Aligning the Full Diffusion Trajectory with
    Fine-Grained Human Preference", arXiv 2509.06942, there with k = 0.1.

    If `k` is a function, it is called with `step`, which the training loop sets.
    """

    def __init__(
        self,
        reward: Reward,
        positive: str | Sequence[str],
        negative: str | Sequence[str],
        k: float | Callable[[int], float] = 0.1,
        template: str = "{adjective}. {prompt}",
        generator: torch.Generator | None = None,
    ) -> None:
        """
        positive, negative  the adjectives; each call draws one of each for its whole batch
        k           a number, or a function of the step
        template    combines an adjective with a prompt
        generator   a generator on the CPU for the draws; required if there are several adjectives of a kind

        Raises ValueError for a reward that takes no texts, an empty list of adjectives, a template without its two
        fields, and several adjectives without a generator.
        """
        if reward.info.prompt != "text":
            raise ValueError(
                f"Relative needs a reward of texts: {reward.info.name!r} takes {reward.info.prompt} prompts"
            )
        self.positive, self.negative = _adjectives(positive), _adjectives(negative)
        if generator is None and len(self.positive) + len(self.negative) > 2:
            raise ValueError("Relative draws its adjectives: give generator=torch.Generator(), seeded, or one of each")
        if not all(field in template for field in ("{adjective}", "{prompt}")):
            raise ValueError(f"template {template!r} must hold {{adjective}} and {{prompt}}")
        self.reward, self.k, self.template, self.generator = reward, k, template, generator
        self.step = 0
        low, high = reward.info.range
        bounds = (-math.inf, math.inf) if callable(k) else ((1 + k) * low - high, (1 + k) * high - low)
        self.info = replace(
            reward.info,
            name=f"relative({reward.info.name})",
            description=f"(1 + k) · {reward.info.name}(positive) - {reward.info.name}(negative)",
            range=bounds,
        )

    def score(self, images: "Images | PictureBatch", prompts: Tensor | Sequence[Any]) -> Tensor:
        """B pictures under B texts -> float32 Tensor[B]. Draws one adjective of each kind."""
        texts = as_texts(prompts)
        shared = PictureBatch.of(images)
        k = self.k(self.step) if callable(self.k) else self.k
        positive, negative = (
            _score(self.reward, shared, [self.template.format(adjective=adjective, prompt=text) for text in texts])
            for adjective in (self._drawn(self.positive), self._drawn(self.negative))
        )
        return (1 + k) * positive - negative

    def _drawn(self, adjectives: list[str]) -> str:
        if len(adjectives) == 1:
            return adjectives[0]
        return adjectives[int(torch.randint(len(adjectives), (), generator=self.generator))]


def _score(reward: Reward, shared: PictureBatch, prompts: Tensor | Sequence[Any]) -> Tensor:
    """A third party's reward accepts pictures, but no `PictureBatch`."""
    if isinstance(reward, (TowerReward, WeightedSum, Hinge, Relative)):
        return reward.score(shared, prompts)
    return reward.score(shared.images, prompts)


def _adjectives(given: str | Sequence[str]) -> list[str]:
    adjectives = [given] if isinstance(given, str) else list(given)
    if not adjectives:
        raise ValueError("Relative without an adjective: give at least one positive and one negative")
    return adjectives


def _free(name: str, taken: Mapping[str, Any]) -> str:
    names = [name, *(f"{name} {count}" for count in range(2, len(taken) + 2))]
    return next(each for each in names if each not in taken)


def _info_of_sum(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> RewardInfo:
    infos = {name: reward.info for name, reward in rewards.items()}
    kinds = {info.prompt for info in infos.values()}
    kinds = kinds - {"none"} or kinds  # rewards that read no prompt combine with either kind
    if len(kinds) > 1:
        raise ValueError(f"WeightedSum of rewards that take different prompts: {', '.join(sorted(kinds))}")
    bounds = [sorted(weights[name] * bound for bound in infos[name].range) for name in infos if weights[name]]
    sizes, classes = ({getattr(info, key) for info in infos.values()} for key in ("image_size", "num_classes"))
    return RewardInfo(
        name="weighted-sum",
        description=" + ".join(f"{weights[name]:g} · {name}" for name in infos),
        range=(sum(low for low, _ in bounds), sum(high for _, high in bounds)),
        licence="; ".join(dict.fromkeys(info.licence for info in infos.values())),
        source="; ".join(dict.fromkeys(info.source for info in infos.values())),
        prompt=kinds.pop(),
        differentiable=all(info.differentiable for info in infos.values()),
        image_size=sizes.pop() if len(sizes) == 1 else None,
        preprocess="; ".join(f"{name}: {info.preprocess}" for name, info in infos.items()),
        num_classes=classes.pop() if len(classes) == 1 else None,
    )
