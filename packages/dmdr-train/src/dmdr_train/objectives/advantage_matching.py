"""Guidance by a reward without a gradient: the advantage of each sample weights the teacher's guidance."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from dmdr_train.base.guarded_scores import scored
from dmdr_train.objectives.decoupled_matching import DecoupledMatching, DecoupledMatchingSection
from dmdr_train.recipe.sections import Reward

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class AdvantageMatchingSection(DecoupledMatchingSection):
    reward: Reward


class AdvantageMatching(DecoupledMatching):
    """Decoupled matching whose augmentation is multiplied by the advantage A = (r - mean) / std of each sample.

    g = (x̂_fake − x̂_cond)(τ_DM) − A · (w − 1) · (x̂_cond − x̂_uncond)(τ_CA). Mean and standard deviation are those of
    the rewards r in the sample's group, whose samples have the same prompt. The reward needs no gradient, and there is
    no policy loss. A picture that the reward leaves without a score has the advantage 0. Where the reward fails,
    `failure` says why, and the loss is NaN, so that no process makes this update. Source: the authors of DMDR, issue 8
    of their repository; Decoupled DMD, arXiv 2511.22677; GRPO, arXiv 2402.03300.
    """

    Section = AdvantageMatchingSection
    needs = frozenset({"fake_score", "reward", "groups"})

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        import torch

        with torch.no_grad():
            pictures = sample.decode(replace(sample, x0=sample.x0.detach()))
            found = scored(self.reward, lambda: self.score(pictures, sample.prompts, sample.draws), pictures)
        if found.failure:
            self.failure = f"{self.reward.info.name} of the objective {self.name}: {found.failure}"
        size = sample.group.count(sample.group[0])
        advantage = advantages(found.score, found.kept, size).to(sample.x0.device)
        loss, values = self.matched(sample, guide, advantage)
        even = (advantage.reshape(-1, size) == 0).all(dim=1)
        score = found.score[found.kept]
        values = {
            **values,
            f"reward/{self.reward.info.name}": score.mean(),
            f"unscored/{self.name}": 1 - found.kept.float().mean(),
            f"constant_groups/{self.name}": even.float().mean(),
        }
        return loss * (1 + 0 * score.sum()).to(loss.device), values  # a score that is no number spoils the update


def advantages(score: "Tensor", kept: "Tensor", group_size: int) -> "Tensor":
    """The advantages `[B]` within groups of consecutive samples; 0 without a score, or in a group of equal scores.

    Args:
        score: `[B]`.
        kept: `[B]`, whether a sample has a score; the others take no part in the mean of their group.
    """
    import torch
    from dmdr_core import group_advantage

    kept = kept & score.isfinite()
    groups, mask = score.where(kept, 0.0).reshape(-1, group_size), kept.reshape(-1, group_size)
    mean = groups.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    found = group_advantage(torch.where(mask, groups, mean).flatten(), group_size)
    return found.where(kept, 0.0)
