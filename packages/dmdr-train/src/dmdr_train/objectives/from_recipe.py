"""Making the objectives of a recipe, and the rewards of objectives and of `watch`."""

from typing import Any

import torch
from dmdr_models.families.protocols import Family

from dmdr_train.base.errors import UserError, naming
from dmdr_train.distributed.device import DTYPES
from dmdr_train.recipe import schema
from dmdr_train.recipe.objective_kinds import OBJECTIVES
from dmdr_train.training.objective import Objective


def make_objectives(settings: schema.Recipe, family: Family, device: torch.device) -> list[Objective]:
    """The objectives of a recipe; those that match distributions first, since automatic weights follow them.

    Raises:
        UserError: a reward or a file of an objective cannot be used.
    """
    objectives: list[Objective] = []
    for i, (name, section) in enumerate(zip(settings.names, settings.objectives, strict=True)):
        kind = OBJECTIVES.load(section.kind)
        given = {}
        if "reward" in kind.needs:
            reward: Any = section
            given["reward"] = make_reward(f"objectives.{i}.reward", reward.reward, settings, family, device)
        try:
            objectives.append(kind(section, name, **given))
        except UserError as error:
            key, message = error.args
            raise UserError(f"objectives.{i}.{key}", message) from error
    return sorted(objectives, key=lambda objective: "fake_score" not in objective.needs)


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
