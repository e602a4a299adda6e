"""Rewards that ask a classifier how plainly a picture shows its class."""

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmdr_rewards.classifier import ImageClassifier
from dmdr_rewards.images import Images
from dmdr_rewards.labels import as_labels
from dmdr_rewards.reward import RewardInfo


class ClassLabelReward:
    """log p(label | picture) = −cross-entropy of a classifier, in (−∞, 0]; 0 is full certainty.

    Source: the class-conditional reward of DMDR, arXiv 2511.13649. `classifier` is the network behind it.
    """

    def __init__(self, classifier: ImageClassifier, name: str, licence: str, source: str) -> None:
        self.classifier = classifier
        self.info = RewardInfo(
            name=name,
            description="log-probability of the class label: -cross_entropy(logits, label)",
            range=(-math.inf, 0.0),
            licence=licence,
            source=source,
            prompt="class_label",
            differentiable=True,
            image_size=classifier.preprocess.image_size,
            preprocess=str(classifier.preprocess),
            num_classes=classifier.num_classes,
        )

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures under B integer class labels -> float32 Tensor[B].

        images: see `dmdr_rewards.images`; float tensors keep their gradient. prompts: integer Tensor[B] or list.
        Raises ValueError for pictures or labels that cannot be scored, naming the value and the fix.
        """
        logits = self.classifier.logits(images)
        labels = as_labels(prompts, len(logits), self.classifier.num_classes, logits.device)
        return log_likelihood(logits, labels).float()


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax(logits)[label]: logits Tensor[B, K], labels LongTensor[B] -> Tensor[B] of the logits' dtype."""
    return -F.cross_entropy(logits, labels, reduction="none")


def from_folder(
    checkpoint: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClassLabelReward:
    """The reward `class-label`: any transformers image classifier in a local folder.

    Format of the folder, preprocessing and what is raised: `ImageClassifier.from_folder`.
    """
    classifier = ImageClassifier.from_folder(checkpoint, device, dtype)
    return ClassLabelReward(classifier, "class-label", licence="that of the checkpoint", source=str(checkpoint))
