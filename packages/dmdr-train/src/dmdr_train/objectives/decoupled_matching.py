"""Decoupled distribution matching: the teacher's guidance is a term of its own, with renoise times of its own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from dmdr_train.recipe.fields import Section
from dmdr_train.recipe.guidance_sections import Renoise
from dmdr_train.recipe.sections import ObjectiveSection
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.renoising import Renoised
    from dmdr_train.training.sample import Sample


class TermSection(Section):
    """One of the two terms."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    renoise: Renoise | None = Field(
        default=None,
        description="a Beta distribution of the renoise times, over the term's own range; null: for matching the "
        "recipe's (guidance.dynamics), for augmentation uniform",
    )
    normalise: Literal["teacher", "none"] = Field(
        default="teacher", description="divide by mean |x0 − x̂| per sample, x̂ the teacher's x0 for the prompt; or not"
    )


class DecoupledMatchingSection(ObjectiveSection):
    weight: Annotated[float, Field(gt=0)] = 1.0
    cfg: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="guidance scale w of the augmentation; null: guidance.cfg, with its jitter"
    )
    matching: TermSection = TermSection()
    augmentation: TermSection = TermSection()

    def check(self, recipe: Any, key: str) -> None:
        super().check(recipe, key)
        if self.cfg is None and recipe.guidance.cfg == 1:
            raise ValueError(
                f"{key}.cfg: is null and guidance.cfg is 1, which leaves nothing to augment; set one of them above 1"
            )

    def teacher_predictions(self, guided: bool) -> int:
        return 3


class DecoupledMatching(Objective):
    """½ · mean (x0 − sg(x0 − g))², with g = (x̂_fake − x̂_cond)(τ_DM) − (w − 1) · (x̂_cond − x̂_uncond)(τ_CA).

    The first term matches distributions; its renoise times τ_DM are those of all objectives unless the section has its
    own. The second one is the augmentation by classifier-free guidance; its times τ_CA are cleaner than the time t that
    the generator predicts at. Each term is weighted and normalised by itself, see `dmdr_core.decoupled_gradient`.
    Source: Decoupled DMD, arXiv 2511.22677.
    """

    Section: ClassVar[type[ObjectiveSection]] = DecoupledMatchingSection
    needs = frozenset({"fake_score"})

    def __init__(self, settings: DecoupledMatchingSection, name: str, reward: Any = None):
        from dmdr_core import UniformRenoise

        super().__init__(settings, name, reward)
        self.matching_times = sampler(settings.matching.renoise)
        self.augmentation_times = sampler(settings.augmentation.renoise) or UniformRenoise()

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        return self.matched(sample, guide, 1.0)

    def matched(
        self, sample: "Sample", guide: "Guide", strength: "Tensor | float"
    ) -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        """The loss and the values to log, with the augmentation multiplied by `strength`, a number or `[B]`."""
        import torch
        from dmdr_core import decoupled_gradient, surrogate_loss

        at, below = guide.renoise(sample, self.matching_times), self.renoise_below(sample, guide)
        fake, cond = guide.fake(sample, at), guide.conditional(sample, at)
        ca_cond, ca_uncond = guide.with_and_without_prompt(sample, below)
        matching, augmentation = self.settings.matching, self.settings.augmentation
        direction = decoupled_gradient(
            fake,
            cond,
            ca_cond,
            ca_uncond,
            guide.cfg(sample.draws) if self.settings.cfg is None else self.settings.cfg,
            norm(matching, sample, cond),
            norm(augmentation, sample, ca_cond),
            matching.weight,
            augmentation.weight * strength,
        )
        missing = torch.stack((fake, cond, ca_cond, ca_uncond)).isnan().flatten(2).any(dim=2).any(dim=0)
        values: dict[str, Tensor | float] = {
            "teacher_scale": guide.teacher_scale(sample.step),
            f"silenced/{self.name}": missing.float().mean(),
        }
        return surrogate_loss(sample.x0, direction), values

    def renoise_below(self, sample: "Sample", guide: "Guide") -> "Renoised":
        """The sample's x0 with fresh noise at a time τ_CA < t drawn per sample."""
        draws, process = sample.draws, guide.family.process
        fraction = self.augmentation_times.sample(
            len(sample.x0), sample.step, draws.each("augmentation_time"), device=sample.x0.device
        )
        return guide.add_noise(sample, process.time_below(sample.t, fraction), "augmentation_noise")


def sampler(renoise: Renoise | None) -> Any:
    """The sampler of a Beta distribution that does not change; None for None."""
    import math

    from dmdr_core import BetaRenoise

    return None if renoise is None else BetaRenoise(renoise.alpha, renoise.beta, math.inf)


def norm(term: TermSection, sample: "Sample", teacher: "Tensor") -> "Tensor | float":
    """The normaliser of a term, `[B]` or 1."""
    from dmdr_core import mean_distance

    return 1.0 if term.normalise == "none" else mean_distance(sample.x0, teacher)
