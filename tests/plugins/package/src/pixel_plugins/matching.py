"""Distribution matching in which the samples count more that are further from the teacher's distribution."""

from dmdr_core import dmd_loss
from dmdr_train.extending import Guide, Objective, ObjectiveSection, Sample
from pydantic import Field
from torch import Tensor


class WeightedMatchingSection(ObjectiveSection):
    power: float = Field(default=0.5, ge=0, description="0 gives every sample the same weight")


class WeightedMatching(Objective):
    """½ mean w (x0 − sg(x0 − g))², with w = |x0_fake − x0_real|^power, divided by its mean over the micro-batch."""

    Section = WeightedMatchingSection
    needs = frozenset({"fake_score"})

    def __call__(self, sample: Sample, guide: Guide) -> tuple[Tensor, dict[str, Tensor]]:
        at = guide.renoise(sample)
        fake, real = guide.fake(sample, at), guide.real(sample, at)
        distance = (fake - real).abs().flatten(1).mean(dim=1) ** self.settings.power
        weight = distance / distance.mean()
        return dmd_loss(sample.x0, real, fake, weight=weight), {f"largest_weight/{self.name}": weight.max()}
