"""How good pictures are: Fréchet distance, precision, recall, accuracy, inception score.

Features and classes come from a classifier that no reward uses; a second Fréchet distance is taken in pixel space.
All randomness comes from the evaluation's own seed. What is right in a picture, the reference says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dmdr_core import randn
from dmdr_models.family import Family
from dmdr_models.sampling import sample
from torch import Tensor

from dmdr_train.base.random_draws import named_generator
from dmdr_train.distributed.collectives import gather_rows
from dmdr_train.evaluation.metrics import frechet_distance, inception_score, precision_recall
from dmdr_train.evaluation.reference_sets import make_reference
from dmdr_train.evaluation.scores import Scores
from dmdr_train.objectives.guarded_scores import asked
from dmdr_train.recipe import schema

BATCH = 125


@dataclass(frozen=True)
class Measured:
    """What a set of pictures looks like to the evaluation: one row per picture."""

    features: Tensor
    pixels: Tensor
    logits: Tensor
    judged: dict[str, Tensor]


class Evaluator:
    """Scores pictures against a reference set; every process makes its share of them.

    A reward that fails gives NaN, and `failure` says why.

    Args:
        rewards: score the pictures as well, for their own sake.
    """

    failure = ""

    def __init__(self, settings: schema.Evaluation, family: Family, device: torch.device, rewards: Sequence[Any] = ()):
        from dmdr_rewards.networks.classifier import ImageClassifier

        self.settings = settings
        self.family = family
        self.device = device
        self.rewards = {reward.info.name: reward for reward in rewards}
        self.classifier = ImageClassifier.from_folder(settings.classifier, device)
        self.reference = make_reference(settings.reference, family, settings.seed)
        world, count = dist.get_world_size(), settings.pictures // dist.get_world_size()
        first = dist.get_rank() * count
        self.batches = [range(i, min(i + BATCH, first + count)) for i in range(first, first + count, BATCH)]
        self.count = world * count
        self.real_set = self._measure(self._real("reference"))

    def real(self) -> Scores:
        """Another draw of real pictures: the best that any model can do."""
        return self._score("real pictures", self._real("real"))

    def model(
        self, name: str, network: Any, steps: int, method: str, guidance: float = 1.0, shift: float = 1.0
    ) -> Scores:
        return self._score(name, self._sampled(network, steps, method, guidance, shift))

    @torch.no_grad()
    def _sampled(self, network: Any, steps: int, method: str, guidance: float, shift: float) -> Iterable[Tensor]:
        for index in self.batches:
            noise = [named_generator(self.settings.seed, "noise", i) for i in index]
            fresh = [named_generator(self.settings.seed, "rollout", i) for i in index]
            latents = sample(
                self.family,
                network,
                self.family.condition(self.reference.prompts(index)),
                randn((len(index), *self.family.latent_shape), noise, device=self.device),
                steps,
                method,
                guidance,
                shift,
                fresh,
            )
            yield self.family.decode(latents)

    def _real(self, name: str) -> Iterable[Tensor]:
        for index in self.batches:
            yield self.reference.pictures(name, index).to(self.device)

    @torch.no_grad()
    def _measure(self, batches: Iterable[Tensor]) -> Measured:
        rows: dict[str, list[Tensor]] = {"features": [], "pixels": [], "logits": []}
        for images, index in zip(batches, self.batches, strict=True):
            prompts = self.reference.prompts(index)
            seen = self.classifier(images)
            rows["features"].append(seen.features.float())
            rows["pixels"].append(F.adaptive_avg_pool2d(images.float(), 8).flatten(1))
            rows["logits"].append(seen.logits.float())
            judged = self.reference.judge(images, prompts, seen.logits)
            for name, reward in self.rewards.items():
                judged[name], failure = asked(partial(reward.score, images, prompts), images)
                if failure:
                    self.failure = f"{name} of the evaluation: {failure}"
            for name, values in judged.items():
                rows.setdefault(name, []).append(values)
        # Every process has rows of its own, and all of them look at all.
        whole = {name: gather_rows(torch.cat(parts).to(self.device)).cpu() for name, parts in rows.items()}
        return Measured(whole.pop("features"), whole.pop("pixels"), whole.pop("logits"), whole)

    def _score(self, name: str, batches: Iterable[Tensor]) -> Scores:
        made = self._measure(batches)
        precision, recall = precision_recall(self.real_set.features, made.features)
        means = {key: values.nanmean().item() for key, values in made.judged.items()}
        return Scores(
            name,
            frechet_distance(self.real_set.features, made.features),
            precision,
            recall,
            means.pop("accuracy"),
            frechet_distance(self.real_set.pixels, made.pixels),
            None if self.family.num_classes is None else inception_score(made.logits),
            means,
        )
