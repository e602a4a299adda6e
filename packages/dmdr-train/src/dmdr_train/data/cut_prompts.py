"""What is said about prompts that are longer than the text encoders' sequences: their ends have no effect."""

from collections.abc import Sequence
from typing import Any

from dmdr_models.families.protocols import Family
from dmdr_models.families.text_encoders import TextEncoders

from dmdr_train.base.errors import naming
from dmdr_train.data.embedding_cache import made_with
from dmdr_train.recipe.schema import Model, Recipe

MOST = 10_000
"""Prompts that are counted; of more, a sample of this size."""


def recipe_cuts(settings: Recipe, family: Family, texts: Any) -> list[str]:
    """A warning for each length at which prompts of a recipe are cut, those of its samples included.

    Args:
        texts: of `data.prompts`, as in `cuts`.

    Raises:
        UserError: a tokenizer is missing or damaged.
    """
    samples = settings.tracking.samples.prompts or []
    return [
        *cuts("data.prompts", texts, settings.model, family),
        *cuts("tracking.samples.prompts", samples, settings.model, family),
    ]


def cuts(key: str, texts: Any, model: Model, family: Family) -> list[str]:
    """A warning for each length at which prompts are cut; none if the family does not run text encoders.

    Args:
        key: where the prompts are from.
        texts: a list, or a `datasets.Dataset` or IterableDataset with the column `prompt`.

    Raises:
        UserError: a tokenizer is missing or damaged.
    """
    if not isinstance(family.text, TextEncoders):
        return []
    prompts, sampled = sample(texts)
    with naming("model.path"):
        found = family.text.cut([prompt.strip() for prompt in prompts])
        last = list(family.text.layout.text_encoders)[-1]
    settable = made_with(model)["max_tokens"]
    return [
        f"warning: {key}: {cut.count} of {len(prompts)} prompts{sampled} are cut to the {cut.length} tokens of "
        f"{' and '.join(cut.parts)}{' (model.max_tokens)' if settable == cut.length and last in cut.parts else ''}; "
        f"the longest has {cut.longest}"
        for cut in found
    ]


def sample(texts: Any) -> tuple[Sequence[str], str]:
    """Up to `MOST` prompts, and how they were sampled, in words; "" if they are all."""
    import datasets

    if isinstance(texts, datasets.IterableDataset):
        prompts = [row["prompt"] for row in texts.take(MOST)]
        return prompts, " (the first ones of the stream)" if len(prompts) == MOST else ""
    size = len(texts)
    rows = range(size) if size <= MOST else [i * size // MOST for i in range(MOST)]
    prompts = [texts[i] for i in rows] if isinstance(texts, list) else texts[rows]["prompt"]
    return prompts, f" (sampled evenly from {size})" if size > MOST else ""
