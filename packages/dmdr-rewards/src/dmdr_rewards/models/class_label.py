"""Rewards from an image classifier: the log-probability of a picture's class label."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dmdr_rewards.interface.info import BUILT_IN, RewardInfo
from dmdr_rewards.interface.reward import TowerReward
from dmdr_rewards.networks.classifier import ImageClassifier
from dmdr_rewards.prompts.labels import as_labels


class ClassLabelReward(TowerReward):
    """log p(label | picture) = −cross-entropy of a classifier, in (−∞, 0].

    Source: the class-conditional reward of DMDR, arXiv 2511.13649. The attribute `classifier` is the network.
    """

    def __init__(self, classifier: ImageClassifier, info: RewardInfo) -> None:
        self.classifier, self.tower, self.preprocess = classifier, classifier.tower, classifier.preprocess
        self.info = replace(
            info,
            image_size=self.preprocess.image_size,
            preprocess=str(self.preprocess),
            num_classes=classifier.num_classes,
        )

    def score_features(self, features: Tensor, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B features under B integer class labels, Tensor[B] or list -> float32 Tensor[B].

        Raises ValueError for labels that are not integers or out of range, and for a number of labels other than B.
        """
        labels = as_labels(prompts, len(features), self.classifier.num_classes, features.device)
        return log_likelihood(self.classifier.head(features), labels).float()


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label]: logits Tensor[B, K], labels LongTensor[B] -> Tensor[B] of the logits' dtype."""
    return -F.cross_entropy(logits, labels, reduction="none")


def from_folder(
    checkpoint: str | PathLike[str],
    preprocess: Literal["reference", "dmdr"] = "reference",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClassLabelReward:
    """The reward `class-label`: any transformers image classifier in a local folder.

    `ImageClassifier.from_folder` documents the folder's format, the preprocessing and the errors.
    """
    classifier = ImageClassifier.from_folder(checkpoint, device, dtype, preprocess)
    return ClassLabelReward(classifier, replace(BUILT_IN["class-label"], source=str(checkpoint)))
