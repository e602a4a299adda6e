"""The adversarial term: the generator's samples become harder to tell from real ones."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dmdr_train.recipe.sections import ObjectiveSection, check_ratio
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class AdversarialSection(ObjectiveSection):
    """With `weight: auto`, the gradient at x0 has `ratio` times the norm of distribution matching's."""

    ratio: Annotated[float, Field(gt=0)] | None = Field(default=None, description="for weight: auto; null: 1")

    def check(self, recipe: Any, key: str) -> None:
        check_ratio(self, key)


class Adversarial(Objective):
    """mean softplus(−D(x_τ)), or mean −D(x_τ) with the hinge loss, with D the logit of `guidance.discriminator`.

    The gradient reaches x0 through the frozen guidance network. With the hinge loss this is the gradient of a reward
    D, which is trained online. Source: DMD2, arXiv 2405.14867; AdvDMD, arXiv 2604.28126.
    """

    Section = AdversarialSection
    needs = frozenset({"discriminator"})

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        from dmdr_core import generator_loss

        logit = guide.logit(sample)
        return generator_loss(guide.discriminator.settings.loss, logit), {f"logit/{self.name}": logit.detach().mean()}
