"""What a discriminator trains: an adversarial term by its gradient, and a policy gradient by its logits alone."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from dmdr_train.objectives.group_rewards import GroupSection, trained
from dmdr_train.objectives.grpo import CLIP, policy_gradient
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


class AdversarialGRPOSection(GroupSection):
    state: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of the logit of the next state")
    final: Annotated[float, Field(ge=0)] = Field(default=1.0, description="weight of the logit at the rollout's end")

    def check(self, recipe: Any, key: str) -> None:
        super().check(recipe, key)
        if self.state == self.final == 0:
            raise ValueError(f"{key}.state: is 0 as final is, so there is no reward; give one of them a weight")


class AdversarialGRPO(Objective):
    """−mean A log p(x_s): the density of the rollout's noisy steps follows `guidance.discriminator` as a reward.

    A = state · a(D(x_s, s)) + final · a(D(x_0, t_end)), with x_s the next state at its time s, x_0 the end of the
    rollout, and a(r) = (r − mean) / std within a group. Samples of a group are at the same step, so that their states
    can be compared. D is trained online, on samples from all positions of the rollout; it needs no decoder, and no
    gradient of D is taken. As in `GRPO`, the last step draws no noise and counts 0.

    Source: the reward of AdvDMD, arXiv 2604.28126, on intermediate and on final states. The sum of two advantages is
    ours; the paper's formula could not be read.
    """

    Section = AdversarialGRPOSection
    needs = frozenset({"discriminator", "groups", "group_positions", "final_x0"})

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        advantage, values = sample.once(f"advantage/{self.name}", lambda: self.advantage(sample, guide))
        loss, more = policy_gradient(sample, advantage, trained(sample, self.settings.steps), CLIP, self.name)
        return loss, {**values, **more}

    def advantage(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, dict[str, Tensor | float]]":
        """A, `[B]` without gradient, and values to log."""
        import torch
        from dmdr_core import group_advantage

        def judged(x: "Tensor", t: "Tensor") -> "tuple[Tensor, Tensor]":
            with torch.no_grad():
                logit = guide.discriminator.logit(x, t, sample.condition).float()
            poison = 0 * logit.sum()  # logits that are not finite make no update
            return group_advantage(logit.nan_to_num(0.0, 0.0, 0.0), size) + poison, logit.mean()

        size, weights = sample.group.count(sample.group[0]), self.settings
        total = torch.zeros(len(sample.x0), device=sample.x0.device)
        values: dict[str, Tensor | float] = {}
        if weights.state:
            advantage, values[f"logit_state/{self.name}"] = judged(sample.next_state, sample.t_next)
            total = total + weights.state * advantage
        if weights.final:
            ends = torch.full_like(sample.t, guide.family.process.t_end)
            advantage, values[f"logit_final/{self.name}"] = judged(sample.final_x0, ends)
            total = total + weights.final * advantage
        return total, values
