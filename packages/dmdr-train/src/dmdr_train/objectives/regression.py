"""Regression to pairs: a start for one-step students."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dmdr_train.objectives.distances import AnyDistance, LatentMSESection
from dmdr_train.recipe.sections import ObjectiveSection
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class RegressionSection(ObjectiveSection):
    weight: Annotated[float, Field(gt=0)] = 1.0
    distance: AnyDistance = LatentMSESection()

    @property
    def files(self) -> dict[str, str]:
        return {f"distance.{key}": path for key, path in self.distance.files.items()}

    @property
    def smallest_picture(self) -> int:
        return self.distance.smallest_picture

    def check(self, recipe: Any, key: str) -> None:
        """Only one-step students can be trained this way."""
        if recipe.rollout.steps != 1:
            raise ValueError(
                f"rollout.steps: {recipe.rollout.steps} does not go with regression, which trains a single step; use 1"
            )


class Regression(Objective):
    """The distance of x0 to the target, the teacher's x0 of the same noise at the end of its whole trajectory.

    Before this, a single step of the teacher does not give a picture. Source: DMD2, arXiv 2405.14867.
    """

    Section = RegressionSection
    needs = frozenset({"pairs"})

    def __init__(self, settings: RegressionSection, name: str, reward: Any = None):
        super().__init__(settings, name, reward)
        self.distance = settings.distance.make()

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        return self.distance(sample), {}
