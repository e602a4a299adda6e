"""The protocol of a reward, and a base class for rewards with an image tower."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dmdr_rewards.interface.info import RewardInfo
from dmdr_rewards.networks.frozen_network import FrozenNetwork
from dmdr_rewards.pictures.batch import PictureBatch
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.pictures.preprocess import Preprocess


@runtime_checkable
class Reward(Protocol):
    """A model that scores pictures. Any object with these two members is a reward; no base class is needed.

    A reward that may leave a picture without a score returns NaN for it, and counts such pictures in an attribute
    `skipped`.
    """

    @property
    def info(self) -> RewardInfo: ...

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures under B prompts -> float32 Tensor[B], 1-D also for one picture, higher is better.

        Raises ValueError or OSError for pictures that cannot be scored.
        """
        ...


class TowerReward:
    """A reward whose image tower does not read the prompt: score = score_features(features(pixels), prompts).

    Subclasses set the attributes and define `score_features`. Work that several rewards need is then done once for a
    batch of pictures (`dmdr_rewards.pictures.batch`).

    preprocess  turns a picture into the tower's pixels
    tower       the frozen image network; equal checkpoints give the same object
    """

    info: RewardInfo
    preprocess: Preprocess
    tower: FrozenNetwork

    def remember_texts(self, count: int) -> None:
        """Remember the embeddings of the last `count` texts from now on. Does nothing for a reward without texts.

        The last bits of an embedding depend on the texts that were encoded with it. With 0 a score depends on its own
        batch alone; a run needs this to repeat itself exactly.
        """
        towers = getattr(self, "towers", None)
        if towers is not None:
            towers.texts.resize(count)

    def notes(self, prompts: Sequence[Any]) -> list[str | None]:
        """For each prompt, what a user should know about its score, such as that it is too long; or None."""
        return [None] * len(prompts)

    def pixels(self, images: "Images | PictureBatch") -> Tensor:
        """B pictures (see `dmdr_rewards.pictures.images`) -> Tensor[B, 3, h, w]; a list may mix sizes."""
        return PictureBatch.of(images).pixels(self.preprocess, self.tower.device, self.tower.precision)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels -> the image tower's features, Tensor[B, …]; float32 on the reward's device."""
        return self.tower(pixels)

    def features_of(self, images: "Images | PictureBatch") -> Tensor:
        """B pictures -> their features, computed once for a `PictureBatch`."""
        batch = PictureBatch.of(images)
        return batch.once((self.tower, self.preprocess), lambda: self.features(self.pixels(batch)))

    def score_features(self, features: Tensor, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B features under B prompts -> float32 Tensor[B]."""
        raise NotImplementedError

    def score(self, images: "Images | PictureBatch", prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures under B prompts -> float32 Tensor[B].

        Float tensors keep their gradient. Raises ValueError for pictures or prompts that cannot be scored; the message
        names the value and the fix.
        """
        return self.score_features(self.features_of(images), prompts)
