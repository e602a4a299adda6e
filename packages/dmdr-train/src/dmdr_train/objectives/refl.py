"""ReFL: the generator follows the gradient of a reward."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from dmdr_train.objectives.reward_objective import RewardObjective
from dmdr_train.recipe.sections import RewardSection, check_template

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws
    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class ReFLSection(RewardSection):
    template: str = Field(default="{prompt}", description="what the reward reads; HPS: Realistic photo {prompt}")

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        return check_template(template, "prompt")


class ReFL(RewardObjective):
    """mean relu(margin − r), with r the reward of the prompt in its template. Source: ReFL, arXiv 2304.05977."""

    Section = ReFLSection

    def score(self, pictures: "Tensor", prompts: Sequence[Any], draws: "Draws") -> "Tensor":
        return self.reward.score(pictures, [self.read(prompt) for prompt in prompts])

    def read(self, prompt: Any) -> Any:
        """What the reward reads for a prompt; class labels stay as they are."""
        return self.settings.template.replace("{prompt}", prompt) if isinstance(prompt, str) else prompt


class FinalReFLSection(ReFLSection):
    def check(self, recipe: Any, key: str) -> None:
        super().check(recipe, key)
        if recipe.rollout.steps == 1:
            raise ValueError(f"{key}.kind: {self.kind} is refl where a rollout has one step; use refl")


class FinalReFL(ReFL):
    """ReFL through the last step alone, which makes the final picture; other samples have no gradient.

    With `grpo` it is the policy gradient of a rollout whose last step draws no noise: the steps that draw noise follow
    the density, and the last step the gradient of the reward. Source: RTDMD, arXiv 2605.26108.
    """

    Section = FinalReFLSection

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        import torch
        from dmdr_core.base.devices import on_device

        last = torch.tensor([position == sample.num_steps - 1 for position in sample.positions])

        def decode(_: "Sample") -> "Tensor":
            pictures = sample.pictures
            return torch.where(on_device(last, pictures.device).reshape(-1, 1, 1, 1), pictures, pictures.detach())

        return super().__call__(replace(sample, decode=decode), guide)
