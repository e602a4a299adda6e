"""Regression to pairs: a start for one-step students."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dmdr_train.recipe.sections import ObjectiveSection
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class RegressionSection(ObjectiveSection):
    weight: Annotated[float, Field(gt=0)] = 1.0

    def check(self, recipe: Any, key: str) -> None:
        """Only one-step students can be trained this way."""
        if recipe.rollout.steps != 1:
            raise ValueError(
                f"rollout.steps: {recipe.rollout.steps} does not go with regression, which trains a single step; use 1"
            )


class Regression(Objective):
    """mean (x0 − target)², with the target the teacher's x0 of the same noise, at the end of its whole trajectory.

    Before this, a single step of the teacher does not give a picture. Source: DMD2, arXiv 2405.14867.
    """

    Section = RegressionSection
    needs = frozenset({"pairs"})

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, float]]":
        from dmdr_core import denoising_loss

        assert sample.target is not None
        return denoising_loss(sample.x0, sample.target), {}
