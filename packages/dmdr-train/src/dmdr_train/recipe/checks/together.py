"""All checks of a recipe, in the order in which their mistakes are shown."""

from dmdr_train.recipe.checks.guidance import check_alignment, check_backbone, check_discriminator, check_guidance
from dmdr_train.recipe.checks.objectives import check_data, check_objective, check_objectives
from dmdr_train.recipe.checks.rollouts import (
    check_groups,
    check_mode,
    check_renoising,
    check_reuse,
    check_steps_apart,
    check_through,
    check_updates,
)
from dmdr_train.recipe.checks.run import (
    check_evaluation,
    check_keeping,
    check_memory,
    check_precision,
    check_start,
    check_watch,
)
from dmdr_train.recipe.derived import Sections
from dmdr_train.recipe.quantised_base import check_quantize


def check(recipe: Sections) -> None:
    """Check all combinations.

    Raises:
        ValueError: for the first that cannot be.
    """
    check_guidance(recipe)
    for i, objective in enumerate(recipe.objectives):
        check_objective(recipe, f"objectives.{i}", objective)
    check_objectives(recipe)
    for i, objective in enumerate(recipe.objectives):
        objective.check(recipe, f"objectives.{i}")
    check_data(recipe)
    check_groups(recipe)
    check_updates(recipe)
    check_mode(recipe)
    check_reuse(recipe)
    check_renoising(recipe)
    check_backbone(recipe)
    check_steps_apart(recipe)
    check_through(recipe)
    check_alignment(recipe)
    check_discriminator(recipe)
    check_quantize(recipe)
    check_start(recipe)
    check_precision(recipe)
    check_memory(recipe)
    check_keeping(recipe)
    check_watch(recipe)
    check_evaluation(recipe)
