"""Texts, the prompts of text-image rewards."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def as_texts(prompts: Tensor | Sequence[Any], count: int | None = None) -> list[str]:
    """A sequence of strings -> list of them.

    Raises ValueError for a single text, for anything that is not text, and for a number of prompts other than `count`,
    the number of pictures, where that is given.
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
