"""What is behind the page of `dmdr-generate serve`: one picture for each of its models, within limits."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dmdr_models.base.errors import UsageError
from dmdr_models.base.secrets import redacted

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for: steps, pixels of a side, letters of a prompt, and requests that wait."""

    steps: int = 50
    side: int = 1024
    letters: int = 1000
    waiting: int = 8


@dataclass(frozen=True)
class Side:
    """A model of the page.

    Attributes:
        draw: what `Drawing.open` returned.
        steps: unless the request says otherwise.
        sized: whether `draw` takes a size.
    """

    name: str
    draw: "Callable[..., Tensor]"
    steps: int
    sized: bool


@dataclass(frozen=True)
class Studio:
    """The models and rewards behind the page; it knows nothing of the page itself.

    Attributes:
        takes: "labels" or "texts", as `Layout.takes`.
        rewards: by name; each has `score(images, prompts)`, as the rewards of dmdr-rewards.
    """

    sides: Sequence[Side]
    takes: str
    limits: Limits = Limits()
    rewards: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, text: str, seed: int, steps: Sequence[int], size: int = 0) -> list[tuple["Image", str]]:
        """Draw one picture with each model, from the same seed.

        Args:
            text: the prompt, or a class label.
            steps: of each model.
            size: the side in pixels; 0 is the models' own size.

        Returns:
            For each model its picture, and a line with its name, steps, seconds and scores. In place of a score that
            a reward cannot give stands the reason.

        Raises:
            UsageError: the request is beyond the limits, or a model cannot take it.
        """
        import torch

        prompt = self._checked(text, seed, steps, size)
        answers = []
        for side, count in zip(self.sides, steps, strict=True):
            began = time.perf_counter()
            changed: dict[str, Any] = {"steps": count}
            if size:
                changed["size"] = size
            try:
                pictures = side.draw([prompt], seed=seed, **changed)
            except ValueError as error:
                raise UsageError(f"{side.name}: {error}") from error
            except torch.OutOfMemoryError:
                raise UsageError(
                    f"{side.name}: the memory is too small for this picture: give a smaller side"
                ) from None
            said = f"{side.name} · {count} step{'s' * (count > 1)} · {time.perf_counter() - began:.1f} s"
            answers.append((_image(pictures), " · ".join([said, *self._scores(pictures, prompt)])))
        return answers

    def _checked(self, text: str, seed: int, steps: Sequence[int], size: int) -> Any:
        limits, text = self.limits, text.strip()
        if not text:
            raise UsageError("the prompt is empty: write what to draw")
        if len(text) > limits.letters:
            raise UsageError(f"the prompt has {len(text)} letters: give at most {limits.letters}")
        if not _is_whole(seed, 0, 2**63 - 1):
            raise UsageError(f"seed {seed} is not in [0, 2^63): give a smaller whole number")
        for count in steps:
            if not _is_whole(count, 1, limits.steps):
                raise UsageError(f"steps {count} is not in 1 to {limits.steps}: give another number")
        if size and not all(side.sized for side in self.sides):
            raise UsageError("the models draw pictures of one size: leave the size at 0")
        if size and not _is_whole(size, 16, limits.side):
            raise UsageError(f"size {size} is not in 16 to {limits.side}: give another number, or 0")
        if self.takes == "texts":
            return text
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{text!r} is no class label: give a number such as 207") from None

    def _scores(self, pictures: "Tensor", prompt: Any) -> list[str]:
        found = []
        for name, reward in self.rewards.items():
            try:
                score = float(reward.score(pictures, [prompt])[0])
            except (ValueError, OSError) as error:
                found.append(redacted(f"{name}: no score ({error})"))
            else:
                found.append(f"{name} {score:.3f}" if math.isfinite(score) else f"{name}: no score")
        return found


def _image(pictures: "Tensor") -> "Image":
    from dmdr_models.drawing.images import grid

    return grid(pictures, columns=1, padding=0)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
