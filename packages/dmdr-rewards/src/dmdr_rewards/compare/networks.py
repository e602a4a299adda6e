"""The networks whose features `dmdr-score compare` and the evaluations of dmdr-train use, by name.

inception   `networks.inception`: a file of the network of the published FIDs, or torchvision's
dinov2      `models.dinov2.backbone`: torch.hub's file, or a transformers folder
clip        the image tower of a CLIP: as the reward `clip` takes it, or a transformers folder
others      the image tower of that reward, such as class-label with a folder of one's own classifier
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.compare.feature_names import FIRST, check_features
from dmdr_rewards.interface import registry
from dmdr_rewards.interface.reward import TowerReward
from dmdr_rewards.models import dinov2
from dmdr_rewards.models.class_label import ClassLabelReward
from dmdr_rewards.models.clip import ClipReward, shorter_side
from dmdr_rewards.networks.clip_towers import transformers_towers
from dmdr_rewards.networks.frozen_network import FrozenNetwork
from dmdr_rewards.networks.inception import FETCH, inception
from dmdr_rewards.pictures.images import Picture, as_picture
from dmdr_rewards.pictures.preprocess import Preprocess
from dmdr_rewards.score.scoring import Steps


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network with its preprocessing: pixels Tensor[B, 3, h, w] -> features Tensor[B, D].

    head        features -> class logits Tensor[B, K], if the network is a classifier
    activation  of a CLIP, in words: the same weights give other features with another
    """

    tower: FrozenNetwork
    steps: Steps
    head: FrozenNetwork | None = None
    activation: str | None = None

    @property
    def preprocess(self) -> str:
        """The steps from a picture to pixels, and the activation, in words."""
        return f"{self.steps}; {self.activation}" if self.activation else str(self.steps)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels on the network's device -> float32 Tensor[B, D]. Raises ValueError for features of another rank."""
        features = self.tower(pixels).float()
        if features.ndim != 2:
            raise ValueError(f"its image tower gives {tuple(features.shape)}: give a network with one vector a picture")
        return features

    def of_pictures(self, images: Tensor) -> Tensor:
        """Pictures Tensor[B, 3, H, W] in [0, 1] -> features, as if they had been written to PNG files and read again.

        Raises ValueError as a call does.
        """
        eight_bit = (255 * images.float()).round().clamp(0, 255).byte().cpu()
        pixels = torch.stack([self.steps.picture(picture) for picture in eight_bit])
        return self(pixels.to(self.tower.device))

    def logits(self, features: Tensor) -> Tensor | None:
        """Features Tensor[B, D] -> class logits Tensor[B, K] on the CPU; None if the network is no classifier."""
        if self.head is None:
            return None
        with torch.inference_mode():
            return torch.cat([self.head(part.to(self.head.device)).cpu() for part in features.split(_ROWS)])


@dataclass(frozen=True)
class Square:
    """Resize the shorter side to `side` (bicubic, antialias) and crop the centre, before the network's own steps."""

    side: int
    steps: Steps

    def picture(self, picture: Picture) -> Tensor:
        """One picture -> pixels. Raises ValueError for a picture that cannot be read."""
        opened = as_picture(picture)
        assert isinstance(opened, Image.Image)  # a decoded file
        square = Preprocess(resize=self.side, crop=(self.side, self.side))
        return self.steps.picture(square.plan(opened.height, opened.width).on_picture(opened))

    def __str__(self) -> str:
        return f"shorter side to {self.side}, bicubic, antialias; centre crop {self.side}x{self.side}; {self.steps}"


def load(
    name: str,
    checkpoint: str | None,
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
    side: int | None = None,
) -> FeatureNetwork:
    """Load the network called `name`.

    options  of the reward of that name, such as model="ViT-B-32" for clip
    side     pictures are first brought to a square of this side

    Raises ValueError for an unknown name, a network without one vector per picture or without a fixed size of its
    pixels, an unknown option, and a checkpoint that is missing, damaged, unsafe or of another model.
    """
    try:
        check_features(name, checkpoint)
        assert checkpoint is not None
        network = _LOADERS.get(name, _of_reward)(name, checkpoint, device, dtype, options)
    except MissingError as error:
        raise MissingError(
            f"{error}; the official weights: {_FETCH[name]}" if name in _FETCH else str(error)
        ) from error
    if side is not None:
        return replace(network, steps=Square(side, network.steps))
    if isinstance(network.steps, Preprocess) and network.steps.image_size is None:
        raise ValueError(f"{name} takes pictures of any size ({network.steps}): give --size, so that all have the same")
    return network


_ROWS = 4096


def _inception(
    name: str, checkpoint: str, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> FeatureNetwork:
    _no_options(name, options)
    return FeatureNetwork(*inception(checkpoint, device, dtype))


def _dinov2(
    name: str, checkpoint: str, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> FeatureNetwork:
    _no_options(name, options)
    return FeatureNetwork(*dinov2.backbone(checkpoint, device, dtype))


def _clip(
    name: str, checkpoint: str, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> FeatureNetwork:
    folder = Path(checkpoint)
    if (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file():
        _no_options(name, options)
        towers = transformers_towers(folder, device, dtype)
        return FeatureNetwork(towers.image, shorter_side(towers.image_size), activation=towers.activation)
    return _of_reward(name, checkpoint, device, dtype, options)


def _of_reward(
    name: str, checkpoint: str, device: torch.device, dtype: torch.dtype, options: dict[str, Any]
) -> FeatureNetwork:
    reward = registry.create(name, checkpoint, device, dtype, **options)
    if not isinstance(reward, TowerReward):
        raise ValueError(f"the reward {name} has no image tower: give one of {', '.join(FIRST)} or class-label")
    head = reward.classifier.head if isinstance(reward, ClassLabelReward) else None
    activation = reward.towers.activation if isinstance(reward, ClipReward) else None
    return FeatureNetwork(reward.tower, reward.preprocess, head, activation)


def _no_options(name: str, options: dict[str, Any]) -> None:
    if options:
        raise ValueError(f"{name} has no option {next(iter(options))}: leave it out")


_FETCH = {"inception": FETCH, "dinov2": dinov2.FETCH}
_LOADERS: dict[str, Callable[..., FeatureNetwork]] = {"inception": _inception, "dinov2": _dinov2, "clip": _clip}
