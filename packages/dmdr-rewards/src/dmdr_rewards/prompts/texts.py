"""Texts: the prompts of text-image rewards."""

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def as_texts(prompts: Tensor | Sequence[Any], count: int | None = None) -> list[str]:
    """A sequence of strings -> list of strings.

    count  number of pictures; not checked if None

    Raises ValueError for a single text, prompts that are not texts, and a number of prompts other than `count`.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the text {prompts!r}: give a list, one prompt per picture, also for a single one")
    if isinstance(prompts, Tensor) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts is a {type(prompts).__name__}: this reward takes a list of texts")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompt {prompt!r} is a {type(prompt).__name__}: this reward takes texts")
    if count is not None and len(prompts) != count:
        raise ValueError(f"{count} images but {len(prompts)} prompts: give one prompt per picture")
    return list(prompts)


def cut(lengths: Sequence[int], context: int) -> list[str | None]:
    """For each number of tokens, a note if it is more than `context`, or None."""
    return [f"reads {context} of the prompt's {count} tokens" if count > context else None for count in lengths]


class Truncation:
    """Warns once, about the first prompt that is longer than `context` tokens."""

    def __init__(self, context: int) -> None:
        self.context, self._told = context, False

    def __call__(self, lengths: Sequence[int], prompts: Sequence[str]) -> None:
        """lengths: the number of tokens in each prompt."""
        longest = max(lengths)
        if longest > self.context and not self._told:
            self._told = True
            prompt = prompts[lengths.index(longest)]
            warnings.warn(
                f"prompts of more than {self.context} tokens are truncated, the first of {longest}: {prompt[:60]!r}…",
                stacklevel=2,
            )
