"""Making the evaluator of a recipe, with its rewards and the network of its features."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from dmdr_models.families.protocols import Family

from dmdr_train.base.errors import UserError, naming
from dmdr_train.evaluation.evaluator import Evaluator
from dmdr_train.evaluation.finished_batches import FinishedBatches
from dmdr_train.objectives.from_recipe import make_reward
from dmdr_train.recipe.derived import numbered
from dmdr_train.recipe.schema import Recipe, Reward

KEY = "tracking.evaluation"


def open_evaluator(
    settings: Recipe,
    family: Family,
    device: torch.device,
    trained: Sequence[Any] | None = None,
    finished: FinishedBatches | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Evaluator:
    """The evaluator of a recipe that has an evaluation.

    Args:
        trained: the rewards that the objectives train on, if they are loaded already.
        finished, progress: as for `Evaluator`.

    Raises:
        UserError: a reward, the classifier or the reference cannot be used.
    """
    evaluation = settings.tracking.evaluation
    assert evaluation is not None
    if evaluation.rewards is True and trained is not None:
        rewards = {reward.info.name: reward for reward in trained}
    else:
        made = scored_by(settings)
        names = numbered([section.name for section in made.values()])
        rewards = {
            name: make_reward(key, section, settings, family, device)
            for name, (key, section) in zip(names, made.items(), strict=True)
        }
    tower = None
    if evaluation.features is not None:
        tower = make_reward(f"{KEY}.features", evaluation.features, settings, family, device)
        if not hasattr(tower, "features_of"):
            name = evaluation.features.name
            raise UserError(f"{KEY}.features.name", f"{name} has no image tower; use another, such as dinov2 or clip")
    with naming(KEY):
        return Evaluator(evaluation, family, device, rewards, tower, finished, progress)


def scored_by(settings: Recipe) -> dict[str, Reward]:
    """The sections of the rewards whose means are scores, by their keys; each reward once."""
    evaluation = settings.tracking.evaluation
    assert evaluation is not None
    if isinstance(evaluation.rewards, list):
        return {f"{KEY}.rewards.{i}": reward for i, reward in enumerate(evaluation.rewards)}
    if not evaluation.rewards:
        return {}
    trained = settings.needing("reward")
    found = {f"objectives.{i}.reward": trained[name].reward for i, name in enumerate(settings.names) if name in trained}
    return {key: found[key] for key in {section.name: key for key, section in found.items()}.values()}
