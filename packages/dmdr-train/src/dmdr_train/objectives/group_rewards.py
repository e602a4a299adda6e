"""What objectives have in common that compare the final pictures of a prompt; the reward needs no gradient."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from dmdr_train.base.guarded_scores import scored
from dmdr_train.recipe.sections import ObjectiveSection, Reward, check_ratio, check_template
from dmdr_train.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws
    from dmdr_train.training.sample import Sample


class GroupSection(ObjectiveSection):
    """With `weight: auto`, the objective's gradient at x0 has `ratio` times the norm of distribution matching's."""

    ratio: Annotated[float, Field(gt=0)] | None = Field(default=None, description="for weight: auto; null: 1")
    steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="train this many first steps of the rollout; null: all that draw noise"
    )

    def check(self, recipe: Any, key: str) -> None:
        """Only steps that draw noise have a density, and only states of the rollout lead to its end."""
        rollout = recipe.rollout
        check_ratio(self, key)
        if rollout.steps == 1:
            raise ValueError(
                f"rollout.steps: 1 draws no noise between steps, and {self.kind} trains the density of these; "
                f"use 2 or more, or a reward with a gradient and refl"
            )
        if rollout.mode == "ode":
            raise ValueError(
                f"rollout.mode: ode draws no noise between steps, and {self.kind} trains the density of these; "
                f"use sde or cps"
            )
        if rollout.states == "authors":
            raise ValueError(
                f"rollout.states: authors are no states of the rollout that {self.kind} finishes; use visited"
            )
        if self.steps is not None and self.steps >= rollout.steps:
            raise ValueError(
                f"{key}.steps: {self.steps} is more than the {rollout.steps - 1} steps that draw noise; use fewer, or "
                f"null"
            )
        if recipe.needing("final_sample"):
            kind = next(iter(recipe.needing("final_sample").values())).kind
            raise ValueError(f"{key}.kind: {self.kind} does not go with {kind}, which trains the last step alone")


class GroupRewardSection(GroupSection):
    """The section of an objective on the rewards of pictures."""

    reward: Reward
    template: str = Field(default="{prompt}", description="what the reward reads; HPS: Realistic photo {prompt}")

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        return check_template(template, "prompt")


class GroupRewards(Objective):
    """An objective on the rewards of final pictures, in groups of one prompt.

    A picture that the reward leaves without a score counts as the mean of its group. Where the reward fails, `failure`
    says why, and the rewards are NaN, so that no process makes this update.
    """

    Section = GroupRewardSection
    needs = frozenset({"reward", "groups", "final_pictures"})

    def score(self, pictures: "Tensor", prompts: Sequence[Any], draws: "Draws") -> "Tensor":
        return self.reward.score(pictures, [self.read(prompt) for prompt in prompts])

    def read(self, prompt: Any) -> Any:
        """What the reward reads for a prompt; class labels stay as they are."""
        return self.settings.template.replace("{prompt}", prompt) if isinstance(prompt, str) else prompt

    def rewards(self, sample: "Sample") -> "tuple[Tensor, dict[str, Tensor | float]]":
        """The rewards of the final pictures in groups, `[G, n]` without gradient, and values to log.

        They are scored once for all updates of a rollout.
        """
        rewards, values = sample.once(f"rewards/{self.name}", lambda: self._score(sample))
        return rewards, dict(values)

    def _score(self, sample: "Sample") -> "tuple[Tensor, dict[str, Tensor | float]]":
        import torch

        pictures, groups = sample.final_pictures, len(set(sample.group))
        with torch.no_grad():
            score, kept, failure = scored(
                self.reward, lambda: self.score(pictures, sample.prompts, sample.draws), pictures
            )
        if failure:
            self.failure = f"{self.reward.info.name} of the objective {self.name}: {failure}"
        values: dict[str, Tensor | float] = {f"reward/{self.reward.info.name}": score.nanmean()}
        if hasattr(self.reward, "skipped"):
            values[f"unscored/{self.name}"] = 1 - kept.float().mean()
        found, kept = score.float().reshape(groups, -1), kept.reshape(groups, -1)
        return torch.where(kept, found, found.nanmean(dim=1, keepdim=True).nan_to_num()), values

    def trained(self, sample: "Sample") -> "Tensor":
        """Whether each sample is at a step that this objective trains, booleans `[B]` on the device."""
        return trained(sample, self.settings.steps)


def trained(sample: "Sample", steps: int | None) -> "Tensor":
    """Whether each sample is among the first `steps` of its rollout that draw noise, booleans `[B]` on the device.

    Args:
        steps: None for all of them.
    """
    import torch
    from dmdr_core.base.devices import on_device

    most = sample.num_steps - 1 if steps is None else steps
    return on_device(torch.tensor([position < most for position in sample.positions]), sample.x0.device)
