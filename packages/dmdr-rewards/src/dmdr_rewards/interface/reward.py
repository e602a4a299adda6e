"""What a reward is."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dmdr_rewards.interface.info import RewardInfo
from dmdr_rewards.networks.frozen_network import Frozen
from dmdr_rewards.pictures.batch import Shared
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.pictures.preprocess import Preprocess


@runtime_checkable
class Reward(Protocol):
    """A model that scores pictures. Anything with these two members is one; no base class is needed.

    One that may leave pictures without a score gives these NaN and counts them in an attribute `skipped`.
    """

    @property
    def info(self) -> RewardInfo: ...

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures under B prompts -> float32 Tensor[B], 1-D also for one picture, higher is better.

        Raises ValueError or OSError for pictures that cannot be scored.
        """
        ...


class TowerReward:
    """A reward whose image tower does not look at the prompt: score = score_features(features(pixels), prompts).

    Subclasses set the attributes and define `score_features`; what several rewards have in common is then computed
    once (`dmdr_rewards.pictures.batch`).

    preprocess  what turns a picture into the tower's pixels
    tower       the frozen image network; one object for equal checkpoints
    """

    info: RewardInfo
    preprocess: Preprocess
    tower: Frozen

    def remember_texts(self, count: int) -> None:
        """Remember the embeddings of the last `count` texts from now on; nothing to do for a reward without any.

        An embedding's last bits depend on the texts that it was made with. With 0 a score depends on its own batch
        alone, which a run that must repeat itself exactly needs.
        """
        towers = getattr(self, "towers", None)
        if towers is not None:
            towers.texts.resize(count)

    def pixels(self, images: "Images | Shared") -> Tensor:
        """B pictures (see `dmdr_rewards.pictures.images`) -> Tensor[B, 3, h, w]; a list may mix sizes."""
        return Shared.of(images).pixels(self.preprocess, self.tower.device, self.tower.precision)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels -> what the image tower makes of them, Tensor[B, …]; float32 on the reward's device."""
        return self.tower(pixels)

    def score_features(self, features: Tensor, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B features under B prompts -> float32 Tensor[B]."""
        raise NotImplementedError

    def score(self, images: "Images | Shared", prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures under B prompts -> float32 Tensor[B].

        Float tensors keep their gradient. Raises ValueError for pictures or prompts that cannot be scored, naming the
        value and the fix.
        """
        return self.score_features(Shared.of(images).features(self), prompts)
