"""The weight of an objective: given, or balanced against distribution matching; from when to when; how it rises."""

import math
from dataclasses import dataclass

from dmdr_train.recipe.sections import ObjectiveSection

MEMORY = 0.9
"""The share of the averaged gradient norms that an update keeps."""


@dataclass
class Weight:
    """What an objective's loss is multiplied by, at every step.

    With `weight: auto` it is ratio · |∂L_DM/∂x0| / |∂L/∂x0|, from running means of the norms over earlier updates, so
    that it does not depend on how a batch is split. The first update has weight 0 and measures. An update is not
    counted where the objective has no gradient, since all rewards are past the margin, where distribution matching has
    none, since the fake score is still the teacher, or where an update overflows.

    `own` and `other` are the running means, of this objective and of distribution matching; a checkpoint keeps them.
    """

    settings: ObjectiveSection
    own: float = 0.0
    other: float = 0.0

    def at(self, step: int) -> float:
        settings = self.settings
        if not settings.active(step):
            return 0.0
        rise = min(1.0, (step - settings.start + 1) / (settings.ramp + 1))
        if settings.weight == "auto":
            return rise * (getattr(settings, "ratio", None) or 1.0) * (self.other / self.own if self.own else 0.0)
        return rise * settings.weight

    @property
    def automatic(self) -> bool:
        """Whether the weight follows the norms of gradients."""
        return self.settings.weight == "auto"

    def active(self, step: int) -> bool:
        """Whether the objective takes part. It also does while it measures, at weight 0."""
        return self.settings.active(step)

    def observe(self, own: float, other: float) -> None:
        """Take the gradient norms at x0 of an update, over its whole batch; not those of a skipped update."""
        if 0.0 in (own, other) or not self.automatic or not math.isfinite(own + other):
            return
        keep = MEMORY if self.own else 0.0
        self.own = keep * self.own + (1 - keep) * own
        self.other = keep * self.other + (1 - keep) * other
