"""Distribution matching: the generator's samples move from the fake score's x0 toward the teacher's."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dmdr_train.recipe.sections import ObjectiveSection
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class DistributionMatchingSection(ObjectiveSection):
    weight: Annotated[float, Field(gt=0)] = 1.0
    divergence: Literal["reverse_kl", "softened_reverse_kl", "jensen_shannon", "jeffreys", "forward_kl"] = Field(
        default="reverse_kl", description="all others weight each sample by its density ratio"
    )

    @property
    def also_needs(self) -> frozenset[str]:
        return frozenset() if self.divergence == "reverse_kl" else frozenset({"discriminator"})

    def check(self, recipe: Any, key: str) -> None:
        """The discriminator's logistic loss estimates a density ratio, and that of renoised x0."""
        found = recipe.guidance.discriminator
        if self.also_needs and recipe.guidance.renoise_from != "x0":
            raise ValueError(
                f"{key}.divergence: {self.divergence} compares renoised x0, and guidance.renoise_from is "
                f"{recipe.guidance.renoise_from}; use x0 there, or reverse_kl"
            )
        if self.also_needs and found is not None and found.loss != "logistic":
            raise ValueError(
                f"guidance.discriminator.loss: {found.loss} gives no density ratio, which {key}.divergence "
                f"{self.divergence} needs; use logistic"
            )
        if self.also_needs and found is not None and found.renoise is not None:
            raise ValueError(
                f"guidance.discriminator.renoise: has other noise levels than {key}.divergence {self.divergence} "
                f"compares samples at; use null"
            )


class DistributionMatching(Objective):
    """½ · mean (x0 − sg(x0 − g))², with g the normalised difference of the fake score's and the teacher's x0.

    Both predict at the same renoised x_τ, without gradient. Source: DMD, arXiv 2311.18828; DMDR, arXiv 2511.13649.
    This lowers the reverse KL divergence. For another f-divergence each sample has the weight h(r)/h(1), where r is
    the density ratio p/q at x_τ of the teacher's samples and the generator's, as `guidance.discriminator` estimates it.
    Source: f-distill, arXiv 2502.15681; `dmdr_core.divergences` has the table.
    """

    Section = DistributionMatchingSection
    needs = frozenset({"fake_score"})

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        from dmdr_core import divergence_weight, dmd_loss

        at = guide.renoise(sample)
        fake, real = guide.fake(sample, at), guide.real(sample, at)
        silenced = (real.isnan() | fake.isnan()).flatten(1).any(dim=1).float().mean()
        values: dict[str, Tensor | float] = {
            "teacher_scale": guide.teacher_scale(sample.step),
            f"silenced/{self.name}": silenced,
        }
        weight = None
        if self.settings.also_needs:
            weight = divergence_weight(self.settings.divergence, guide.log_ratio(sample, at))
            values[f"divergence_weight/{self.name}"] = weight.mean()
        return dmd_loss(sample.x0, real, fake, weight=weight), values
