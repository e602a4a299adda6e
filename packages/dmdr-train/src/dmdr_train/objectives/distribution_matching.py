"""Distribution matching: the generator's samples move from the fake score's x0 toward the teacher's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from dmdr_train.recipe.sections import ObjectiveSection
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class DistributionMatchingSection(ObjectiveSection):
    weight: Annotated[float, Field(gt=0)] = 1.0


class DistributionMatching(Objective):
    """½ · mean (x0 − sg(x0 − g))², with g the normalised difference of the fake score's and the teacher's x0.

    Both predict at the same renoised x_τ, without gradient. Source: DMD, arXiv 2311.18828; DMDR, arXiv 2511.13649.
    """

    Section = DistributionMatchingSection
    needs = frozenset({"fake_score"})

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        from dmdr_core import dmd_loss

        at = guide.renoise(sample)
        fake, real = guide.fake(sample, at), guide.real(sample, at)
        silenced = (real.isnan() | fake.isnan()).flatten(1).any(dim=1).float().mean()
        values: dict[str, Tensor | float] = {
            "teacher_scale": guide.teacher_scale(sample.step),
            f"silenced/{self.name}": silenced,
        }
        return dmd_loss(sample.x0, real, fake), values
