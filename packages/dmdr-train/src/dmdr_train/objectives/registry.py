"""The objectives of a recipe, and the rewards that they and `watch` score with."""

from typing import Any

import torch
from dmdr_models.families.protocols import Family

from dmdr_train.base.errors import UserError, naming
from dmdr_train.distributed.device import DTYPES
from dmdr_train.objectives.terms import SRPO, DistributionMatching, Objective, ReFL, Regression
from dmdr_train.recipe import schema


def make_objectives(settings: schema.Recipe, family: Family, guidance: Any, device: torch.device) -> list[Objective]:
    """Distribution matching first: the others' automatic weights follow it."""
    objectives: list[Objective] = []
    for i, (name, objective) in enumerate(zip(settings.names, settings.objectives, strict=True)):
        key = f"objectives.{i}.reward"
        if isinstance(objective, schema.DistributionMatching):
            objectives.insert(0, DistributionMatching(objective, settings.guidance, family, guidance))
        elif isinstance(objective, schema.Regression):
            objectives.append(Regression(objective))
        elif isinstance(objective, schema.ReFL):
            objectives.append(ReFL(objective, make_reward(key, objective.reward, settings, family, device), name))
        else:
            objectives.append(SRPO(objective, make_reward(key, objective.reward, settings, family, device), name))
    return objectives


def make_reward(key: str, reward: schema.Reward, settings: schema.Recipe, family: Family, device: torch.device) -> Any:
    """A reward of the recipe, as `dmdr_rewards.create` makes it; UserErrors name `key`."""
    import dmdr_rewards

    options = dict(reward.options)
    if "rewards" in settings.memory.gradient_checkpointing and dmdr_rewards.describe(reward.name).differentiable:
        options["gradient_checkpointing"] = True
    if reward.checkpoint is not None:
        options["checkpoint"] = reward.checkpoint
    with naming(key):
        made = dmdr_rewards.create(reward.name, device=device, dtype=DTYPES[reward.precision], **options)
    if isinstance(made, dmdr_rewards.TowerReward):
        made.remember_texts(0)  # what a resumed run knows differs
    known = made.info.num_classes
    if known is not None and family.num_classes is not None and known < family.num_classes:
        raise UserError(
            f"{key}.checkpoint",
            f"{reward.checkpoint} knows {known} classes and the model has {family.num_classes}; give another reward",
        )
    return made
