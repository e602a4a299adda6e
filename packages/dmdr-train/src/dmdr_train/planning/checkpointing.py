"""`memory.gradient_checkpointing: auto`: what memory asks for, and no more, since checkpointing repeats operations."""

from dmdr_models import registry

from dmdr_train.planning.costs import Costs, costs_of
from dmdr_train.planning.memory import memory
from dmdr_train.recipe.schema import Recipe

CHOICES: tuple[list[str], ...] = ([], ["network"], ["network", "vae", "rewards"])
"""What is repeated in backward passes, the least first."""

SHARE = 0.9
"""The share of the usable memory that a choice may need by the plan, which is wrong by up to a tenth."""


def with_checkpointing(settings: Recipe, parts: list[str]) -> Recipe:
    """The recipe with these parts checkpointed, as far as its family has them."""
    if "vae" not in registry.find(settings.model.family).parts:
        parts = [part for part in parts if part != "vae"]
    kept = settings.memory.model_copy(update={"gradient_checkpointing": parts})
    return settings.model_copy(update={"memory": kept})


def fitted(settings: Recipe, world: int, capacity: int) -> tuple[Recipe, Costs]:
    """A recipe with what `auto` becomes, and its costs: the least that fits into `SHARE` of `capacity` bytes of a GPU.

    If nothing fits, it is the most. A recipe that names the parts stays as it is.

    Raises:
        UserError: the sizes of a model are not known.
    """
    if settings.memory.gradient_checkpointing != "auto":
        return settings, costs_of(settings)
    for parts in CHOICES:
        chosen = with_checkpointing(settings, parts)
        costs = costs_of(chosen)
        if memory(chosen, costs, world).total <= SHARE * capacity:
            break
    return chosen, costs
