"""What a reward is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from dmdr_rewards.images import Images


@dataclass(frozen=True)
class RewardInfo:
    """What a user should know about a reward before trusting its numbers.

    name          the name given to `dmdr_rewards.create`
    description   what is scored, as a formula where there is one
    range         lowest and highest score
    licence       of the weights
    source        where model and definition were published
    prompt        what `score` takes as prompts: "class_label" (integers) or "text" (strings)
    differentiable  whether gradients reach the pixels
    image_size    (height, width) that the network sees; None if it takes pictures as they come
    preprocess    how pictures get there, in words
    num_classes   number of class labels; None for text
    """

    name: str
    description: str
    range: tuple[float, float]
    licence: str
    source: str
    prompt: Literal["class_label", "text"]
    differentiable: bool
    image_size: tuple[int, int] | None
    preprocess: str
    num_classes: int | None = None


@runtime_checkable
class Reward(Protocol):
    """A model that scores pictures. Anything with these two members is one; no base class is needed."""

    @property
    def info(self) -> RewardInfo: ...

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures under B prompts -> float32 Tensor[B], 1-D also for one picture, higher is better."""
        ...
