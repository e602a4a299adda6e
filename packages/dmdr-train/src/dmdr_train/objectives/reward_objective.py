"""What objectives have in common that train on a differentiable reward."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dmdr_train.base.guarded_scores import scored
from dmdr_train.recipe.sections import RewardSection
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class RewardObjective(Objective):
    """mean relu(margin − r), with r a differentiable score of the decoded pictures.

    A reward may leave pictures without a score and count them in its attribute `skipped`. They are left out of the
    mean, and without any score the loss is 0. Where the reward fails, `failure` says why, and the loss is NaN, so that
    no process makes this update.

    Subclasses override `score` where r is not the reward of the prompts themselves.

    Attributes:
        scored: the name that logs give r.
    """

    Section = RewardSection
    needs = frozenset({"reward", "reward_gradient"})

    def __init__(self, settings: Any, name: str, reward: Any):
        super().__init__(settings, name, reward)
        self.scored: str = reward.info.name

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        pictures = sample.pictures.view_as(sample.pictures)
        score, kept, failure = scored(self.reward, lambda: self.score(pictures, sample.prompts, sample.draws), pictures)
        if failure:
            self.failure = f"{self.reward.info.name} of the objective {self.name}: {failure}"
        values: dict[str, Tensor | float] = {}
        if hasattr(self.reward, "skipped"):
            values[f"unscored/{self.name}"] = 1 - kept.float().mean()
            score = score[kept]
        values[f"reward/{self.scored}"] = score.detach().mean()
        values[f"past_margin/{self.name}"] = (score > self.settings.margin).float().mean()
        return self.loss(score), values

    def loss(self, score: "Tensor") -> "Tensor":
        """mean relu(margin − r) over `[n]` scores; 0 without scores, and NaN where a score is not finite."""
        from dmdr_core import hinge

        if len(score) == 0:
            return score.sum()
        # Without reading the scores, for which the CPU would wait for the device.
        poison = 1 + 0 * score.detach().sum()
        return hinge(score.nan_to_num(0.0, 0.0, 0.0), self.settings.margin).mean() * poison
