"""Scores of pictures: Fréchet distance, precision, recall, accuracy, inception score.

A classifier that no reward uses gives features and classes; a second Fréchet distance is computed in pixel space. The
reference set decides which pictures are right, for the accuracy. All random numbers depend on the evaluation's seed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dmdr_models.families.protocols import Family
from dmdr_rewards.compare.metrics import frechet_distance, inception_score, precision_recall
from torch import Tensor

from dmdr_train.distributed.collectives import gather_rows
from dmdr_train.evaluation.reference_sets import make_reference
from dmdr_train.evaluation.scores import Scores
from dmdr_train.evaluation.seeded_sampling import SamplingPlan, draw_latents
from dmdr_train.objectives.guarded_scores import asked
from dmdr_train.recipe import schema

BATCH = 125


@dataclass(frozen=True)
class Measured:
    """Measurements of a set of pictures, one row per picture."""

    features: Tensor
    pixels: Tensor
    logits: Tensor
    judged: dict[str, Tensor]


class Evaluator:
    """Scores pictures against a reference set. Every process makes its share of the pictures.

    Args:
        rewards: their mean scores join the results.

    Attributes:
        failure: why a reward failed, which then counts as NaN; empty if none has failed.
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
        """Score other real pictures: no model can do better."""
        return self._score("real pictures", self._real("real"))

    def model(self, name: str, network: Any, plan: SamplingPlan) -> Scores:
        """Score the pictures of a network."""
        return self._score(name, self._sampled(network, plan))

    @torch.no_grad()
    def _sampled(self, network: Any, plan: SamplingPlan) -> Iterable[Tensor]:
        for index in self.batches:
            prompts = self.reference.prompts(index)
            latents = draw_latents(self.family, network, plan, prompts, self.settings.seed, index, self.device)
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
        # Every process measures its own rows, and then has the rows of all.
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
