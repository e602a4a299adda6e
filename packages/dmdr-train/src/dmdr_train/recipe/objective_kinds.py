"""The kinds of objectives: what a recipe may name, where the code of each is, and what each needs.

A kind is the name of an entry point in the group `dmdr_objectives`. It leads to the objective's class, whose attribute
`Section` is its recipe section. A module is imported when a recipe names it; the built-in ones import no torch then.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainValidator, SerializeAsAny, field_validator

from dmdr_train.base.plugins import Plugins
from dmdr_train.recipe.sections import ObjectiveSection

OBJECTIVES = Plugins("dmdr_objectives", "kind of objective")


class _Kind(BaseModel):
    """What the section of every objective holds, whatever its kind is."""

    model_config = ConfigDict(extra="ignore")
    kind: str

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        OBJECTIVES.load(kind)
        return kind


def needs(section: ObjectiveSection) -> frozenset[str]:
    """What an objective needs of the trainer; see `dmdr_train.training.objective.Objective`."""
    return frozenset(OBJECTIVES.load(section.kind).needs) | section.also_needs


def section_class(kind: str) -> type[ObjectiveSection]:
    """The recipe section of a kind of objective. Raises ValueError for an unknown kind."""
    return OBJECTIVES.load(kind).Section


def _section(value: Any) -> ObjectiveSection:
    if isinstance(value, ObjectiveSection):
        return value
    return section_class(_Kind.model_validate(value).kind).model_validate(value)


AnyObjective = Annotated[SerializeAsAny[ObjectiveSection], PlainValidator(_section)]
"""The section of an objective, validated by the class that its `kind` names."""
