"""SRPO: the generator follows the difference of a reward between two adjectives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from dmdr_train.objectives.reward_objective import RewardObjective
from dmdr_train.recipe.sections import RewardSection, check_template

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws


class SRPOSection(RewardSection):
    positive: list[str] = Field(default=["Natural-lighting", "Detailed", "Realistic"], min_length=1)
    negative: list[str] = Field(default=["Painting", "CG Render", "Oil"], min_length=1)
    k: Annotated[float, Field(ge=0)] = 0.1
    template: str = "{adjective}. {prompt}"

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        return check_template(template, "adjective", "prompt")


class SRPO(RewardObjective):
    """mean relu(margin − r), with r = (1 + k) · reward(positive) − reward(negative).

    An adjective of each kind precedes the prompt, the same two for a whole update. Source: SRPO, arXiv 2509.06942.
    """

    Section = SRPOSection
    needs = frozenset({"reward", "reward_gradient", "reward_of_texts"})

    def __init__(self, settings: Any, name: str, reward: Any):
        import torch
        from dmdr_rewards import Relative

        super().__init__(settings, name, reward)
        draws_come_with_the_sample = torch.Generator()
        self.relative = Relative(
            reward, settings.positive, settings.negative, settings.k, settings.template, draws_come_with_the_sample
        )
        self.scored = self.relative.info.name

    def score(self, pictures: "Tensor", prompts: Sequence[Any], draws: "Draws") -> "Tensor":
        self.relative.generator = draws.shared("adjectives")
        return self.relative.score(pictures, prompts)
