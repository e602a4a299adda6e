"""The classifier of the evaluation."""

import torch
import torch.nn.functional as F
from dmdr_train.problems import scenes
from small_models import (
    reconstruct,
    regnet,
    save_classifier,
    to_vae,
    train_classifier,
)
from torch import Tensor

from scene_parts.drawn_pictures import CAPTIONS, HOME, NUM_PICTURES, load_vae, pictures
from scene_parts.reward_model import PLACES, places_of

LABELS = [*PLACES, "bright", "warm ground"]


def labels_of(images: Tensor, captions: list[str]) -> Tensor:
    """Return the labels of drawings, `[N, 23]` of 0 and 1."""
    ground = images[:, :, 0].float().mean(dim=2)
    looks = torch.stack([scenes.brightness(images / 255) > 0.68, ground[:, 0] > ground[:, 2]], dim=1)
    return torch.cat([places_of(captions), looks], dim=1)


def make_classifier(steps: int) -> None:
    """Train a convolutional network to say which things are where; the evaluation uses its features.

    It is trained on drawings and on reconstructions of the VAE.
    """
    torch.manual_seed(0)
    model = regnet(LABELS, problem_type="multi_label_classification")
    data, index = pictures(NUM_PICTURES, seed=13)
    labels = labels_of(data, [CAPTIONS[i] for i in index])
    data[: NUM_PICTURES // 2] = reconstruct(load_vae(), data[: NUM_PICTURES // 2])
    loss = F.binary_cross_entropy_with_logits
    train_classifier("classifier", model, data, labels, loss, steps=steps, seed=14)
    test, index = pictures(2000, seed=16)
    with torch.no_grad():
        right = (model(pixel_values=to_vae(test)).logits > 0) == (labels_of(test, [CAPTIONS[i] for i in index]) > 0)
    print(f"classifier: share of right labels {dict(zip(LABELS, right.float().mean(dim=0).tolist(), strict=True))}")
    save_classifier(model, HOME / "classifier", size=32)
