"""`memory.gradient_checkpointing: auto`: what memory asks for, and no more, since checkpointing repeats operations."""

from bisect import bisect_left
from dataclasses import replace
from functools import cache

from dmdr_models import registry

from dmdr_train.planning.costs import Costs, costs_of
from dmdr_train.planning.memory import memory
from dmdr_train.planning.schedule import uses_pictures
from dmdr_train.recipe.schema import Recipe

BLOCKS: tuple[list[str], ...] = ([], ["network/4"], ["network/2"], ["network"])
"""The blocks of the network that backward passes compute again, the fewest first."""
PICTURES = ["vae", "rewards"]
"""What else they compute again; it is less than a quarter of a large network."""
MOST = [*BLOCKS[-1], *PICTURES]
CHOICES: tuple[list[str], ...] = (*BLOCKS, MOST)
"""What a recipe may name, the fewest operations first."""

SHARE = 0.9
"""The share of the usable memory that a choice may need by the plan, which is wrong by up to a tenth."""


def with_checkpointing(settings: Recipe, parts: list[str]) -> Recipe:
    """The recipe with these parts checkpointed, as far as it has them."""
    if not any(map(uses_pictures, settings.objectives)):
        parts = [part for part in parts if part not in PICTURES]
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

    def fits(chosen: Recipe, costs: Costs) -> bool:
        return memory(chosen, costs, world).total <= SHARE * capacity

    @cache
    def with_pictures(level: int) -> tuple[Recipe, Costs]:
        chosen = with_checkpointing(settings, [*BLOCKS[level], *PICTURES])
        return chosen, costs_of(chosen)

    none = with_checkpointing(settings, [])
    plain = none, costs_of(none)
    if fits(*plain):
        return plain
    least = bisect_left(range(len(BLOCKS) - 1), True, key=lambda level: fits(*with_pictures(level)))
    chosen, costs = with_pictures(least)
    alone = with_checkpointing(settings, BLOCKS[least])
    alone_costs = replace(costs, decoder=plain[1].decoder, rewards=plain[1].rewards)
    return (alone, alone_costs) if fits(alone, alone_costs) else (chosen, costs)
