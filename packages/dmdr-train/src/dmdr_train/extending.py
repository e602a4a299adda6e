"""What the authors of objectives and trackers import; docs/extending.md has an example of each.

Rewards need `dmdr_rewards` alone, and model families `dmdr_models` alone.
"""

from typing import TYPE_CHECKING, Any

from dmdr_train.objectives.group_rewards import GroupRewards, GroupRewardSection
from dmdr_train.objectives.reward_objective import RewardObjective
from dmdr_train.recipe.fields import Section
from dmdr_train.recipe.sections import ObjectiveSection, Reward, RewardSection
from dmdr_train.tracking.tracker import Tracker
from dmdr_train.training.objective import NEEDS, Objective
from dmdr_train.training.sample import Sample

if TYPE_CHECKING:
    from dmdr_train.training.guide import Guide

__all__ = [
    "NEEDS", "GroupRewardSection", "GroupRewards", "Guide", "Objective", "ObjectiveSection", "Reward",
    "RewardObjective", "RewardSection", "Sample", "Section", "Tracker",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "Guide":  # imports torch, which a check of a recipe does without
        from dmdr_train.training.guide import Guide

        return Guide
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
