"""The recipe: ten sections that fully define a run. `sections` has their keys, `checks` what cannot be together."""

from typing import Any

from dmdr_rewards.base.secrets import ADVICE, secret_in
from pydantic import model_validator

from dmdr_train.recipe.alarm_rules import DEFAULT_RULES, AnyRule, Limit, RewardHacking
from dmdr_train.recipe.checks.together import check
from dmdr_train.recipe.derived import Sections
from dmdr_train.recipe.fields import Section
from dmdr_train.recipe.guidance_sections import Alignment, DiscriminatorHead, Dynamics, Guidance, Renoise
from dmdr_train.recipe.sections import (
    Data,
    Lora,
    Memory,
    Model,
    ObjectiveSection,
    Optim,
    Optimizer,
    Reward,
    RewardSection,
    Rollout,
    Run,
)
from dmdr_train.recipe.tracking_sections import DRAWN, EVALUATED, Evaluation, Samples, Tracking, Watch

__all__ = [
    "DEFAULT_RULES", "DRAWN", "EVALUATED", "Alignment", "AnyRule", "Data", "DiscriminatorHead", "Dynamics",
    "Evaluation", "Guidance", "Limit", "Lora", "Memory", "Model", "ObjectiveSection", "Optim", "Optimizer", "Recipe",
    "Renoise", "Reward", "RewardHacking", "RewardSection", "Rollout", "Run", "Samples", "Section", "Tracking", "Watch",
]  # fmt: skip


class Recipe(Sections):
    """A recipe whose sections go together."""

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, data: Any) -> Any:
        if key := secret_in(data):
            raise ValueError(f"{key}: {ADVICE}")
        return data

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        check(self)
        return self
