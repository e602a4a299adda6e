"""What a reward is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from dmdr_rewards.frozen import Frozen
from dmdr_rewards.images import Images
from dmdr_rewards.preprocess import Preprocess
from dmdr_rewards.sharing import Shared


@dataclass(frozen=True)
class RewardInfo:
    """What a user should know about a reward before trusting its numbers.

    name          the name given to `dmdr_rewards.create`
    description   what is scored, as a formula where there is one
    range         lowest and highest score
    licence       of the weights
    source        where model and definition were published
    prompt        what `score` takes as prompts: "text" (strings), "class_label" (integers) or "none" (not read)
    differentiable  whether gradients reach the pixels
    image_size    (height, width) that the network sees; None if it takes pictures as they come
    preprocess    how pictures get there, in words
    num_classes   number of class labels; None for text
    checkpoint    what `create` takes as checkpoint, in words; "none" for a reward without weights
    """

    name: str
    description: str
    range: tuple[float, float]
    licence: str
    source: str
    prompt: Literal["class_label", "text", "none"]
    differentiable: bool
    image_size: tuple[int, int] | None
    preprocess: str
    num_classes: int | None = None
    checkpoint: str = "none"


@runtime_checkable
class Reward(Protocol):
    """A model that scores pictures. Anything with these two members is one; no base class is needed."""

    @property
    def info(self) -> RewardInfo: ...

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures under B prompts -> float32 Tensor[B], 1-D also for one picture, higher is better."""
        ...


class TowerReward:
    """A reward whose image tower does not look at the prompt: score = score_features(features(pixels), prompts).

    Subclasses set the attributes and define `score_features`; what several rewards have in common is then computed
    once (`dmdr_rewards.sharing`).

    preprocess  what turns a picture into the tower's pixels
    tower       the frozen image network; one object for equal checkpoints
    """

    info: RewardInfo
    preprocess: Preprocess
    tower: Frozen

    def pixels(self, images: "Images | Shared") -> Tensor:
        """B pictures (see `dmdr_rewards.images`) -> Tensor[B, 3, h, w]; a list may mix sizes."""
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


Factory = TypeVar("Factory", bound=Callable[..., Any])


def described(info: RewardInfo) -> Callable[[Factory], Factory]:
    """Decorate a reward's factory with what is known before a checkpoint is loaded: `dmdr_rewards.describe`."""

    def mark(factory: Factory) -> Factory:
        factory.info = info  # type: ignore[attr-defined]
        return factory

    return mark
