"""ReFL: the generator follows the gradient of a reward."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from dmdr_train.objectives.reward_objective import RewardObjective
from dmdr_train.recipe.sections import RewardSection, check_template

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws


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
