"""Making the evaluator of a recipe, with its rewards and the network of its features."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from dmdr_models.families.protocols import Family

from dmdr_train.base.errors import naming
from dmdr_train.distributed.device import DTYPES
from dmdr_train.evaluation.evaluator import Evaluator
from dmdr_train.evaluation.finished_batches import FinishedBatches
from dmdr_train.objectives.from_recipe import make_reward
from dmdr_train.recipe.derived import numbered
from dmdr_train.recipe.schema import Recipe, Reward

if TYPE_CHECKING:
    from dmdr_rewards.compare.networks import FeatureNetwork

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
    network = None if evaluation.features is None else open_network(evaluation.features, family, device)
    with naming(KEY):
        return Evaluator(evaluation, family, device, rewards, network, finished, progress)


def open_network(features: Reward, family: Family, device: torch.device) -> "FeatureNetwork":
    """The network of `tracking.evaluation.features`, as `dmdr-score compare --features` loads it.

    Raises:
        UserError: it cannot be used.
    """
    from dmdr_rewards.compare.networks import load

    with naming(f"{KEY}.features"):
        network = load(features.name, features.checkpoint, device, DTYPES[features.precision], features.options)
        with torch.inference_mode():
            network.of_pictures(torch.zeros(1, 3, *family.size))  # a tower may give more than one vector a picture
        return network


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
