"""GRPO: the density of the rollout's noisy steps follows a reward, which needs no gradient."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dmdr_train.objectives.group_rewards import GroupRewards, GroupRewardSection

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample

CLIP = 1e-3
"""Small, since the density is that of one dimension on average; see docs/objectives/grpo.md."""


class GRPOSection(GroupRewardSection):
    clip: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description=f"how far the ratio of densities may leave 1 before it stops training; null: {CLIP}"
    )

    def check(self, recipe: Any, key: str) -> None:
        super().check(recipe, key)
        if self.clip is not None and recipe.rollout.updates == 1:
            raise ValueError(
                f"{key}.clip: {self.clip} has no effect with rollout.updates 1, where the ratio of densities is 1; "
                f"use 2 or more updates, or leave it out"
            )


class GRPO(GroupRewards):
    """−mean min(ρ A, clamp(ρ, 1 ± clip) A), with ρ the ratio of the densities of the next state, now and when drawn.

    A = (r − mean) / std within a group, with r the reward of the picture at the rollout's end. A sample counts 0 at the
    last step, which draws no noise, and past the first `steps`. Positions are uniform, so the mean over samples is the
    policy gradient of all these steps together, up to a factor.

    In the first update of a rollout ρ is 1, and its gradient is that of the log-density, of one dimension on average
    (`dmdr_core.gaussian_log_density`). In later ones, of `rollout.updates`, the generator has moved on: a sample whose
    ρ is past the clip, on the side that its A asks for, has no gradient. Rewards and A stay those of the first update.
    Groups lie within a micro-batch, so A needs no other process.

    There is no KL term: distribution matching, another objective of the recipe, keeps the generator near the teacher.
    Sources: GRPO, arXiv 2402.03300; for flow models Flow-GRPO, arXiv 2505.05470; for few-step students together with
    distribution matching RTDMD, arXiv 2605.26108. The clip is that of PPO, arXiv 1707.06347.
    """

    Section = GRPOSection

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        from dmdr_core import group_advantage

        rewards, values = self.rewards(sample)
        poison = 1 + 0 * rewards.sum()
        advantage = group_advantage(rewards.nan_to_num(0.0, 0.0, 0.0).flatten(), rewards.shape[1])
        clip = self.settings.clip or CLIP
        loss, more = policy_gradient(sample, advantage, self.trained(sample), clip, self.name)
        loss, values = loss * poison, {**values, **more}
        values[f"constant_groups/{self.name}"] = (rewards == rewards[:, :1]).all(dim=1).float().mean()
        values[f"reward_std/{self.name}"] = rewards.std(dim=1, correction=0).mean()
        return loss, values


def policy_gradient(
    sample: "Sample", advantage: "Tensor", trained: "Tensor", clip: float, name: str
) -> "tuple[Tensor, dict[str, Tensor | float]]":
    """The clipped loss of the density of a sample's next states, a scalar, and values to log.

    Args:
        advantage: `[B]`, without gradient.
        trained: `[B]` booleans; the other samples count 0.
        name: of the objective.
    """
    import torch
    from dmdr_core import gaussian_log_density, policy_loss

    mean, std = sample.next_distribution(sample.x0)
    std = torch.where(trained.reshape(std.shape), std, 1.0)  # the last step has no density
    log_density = gaussian_log_density(sample.next_state, mean, std)
    drawn = sample.once(f"log_density/{name}", log_density.detach)
    loss = policy_loss(log_density, drawn, trained * advantage, clip).mean()
    values: dict[str, Tensor | float] = {}
    if sample.again:
        ratio = (log_density.detach() - drawn).exp()
        stopped = ratio.clamp(1 - clip, 1 + clip) * advantage < ratio * advantage
        count = trained.sum().clamp(min=1)
        values[f"clipped/{name}"] = (trained & stopped).sum() / count
        values[f"ratio/{name}"] = 1 + (trained * (ratio - 1)).sum() / count
    return loss, values
