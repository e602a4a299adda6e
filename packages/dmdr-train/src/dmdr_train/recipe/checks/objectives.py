"""What the objectives of a recipe need of each other and of the data."""

from dmdr_train.recipe.derived import Sections, merged
from dmdr_train.recipe.objective_kinds import needs
from dmdr_train.recipe.sections import ObjectiveSection


def check_objective(recipe: Sections, key: str, objective: ObjectiveSection) -> None:
    """Check when an objective is at work."""
    if objective.start >= recipe.run.steps:
        raise ValueError(
            f"{key}.start: {objective.start} is never reached in run.steps {recipe.run.steps}; "
            f"use a smaller one, or remove the objective"
        )
    if objective.stop is not None and objective.stop <= objective.start:
        raise ValueError(f"{key}.stop: {objective.stop} is not after its start {objective.start}; use a later one")


def check_objectives(recipe: Sections) -> None:
    """Check that the objectives together distil, and leave no step without any."""
    steps = recipe.run.steps
    if all("reward" in needs(o) and "fake_score" not in needs(o) for o in recipe.objectives):
        raise ValueError("objectives: rewards alone are no distillation; add one of kind distribution_matching")
    spans = merged(o.span(steps) for o in recipe.objectives)
    for before, after in zip([range(0), *spans], [*spans, range(steps, steps)], strict=True):
        if after.start > before.stop:
            raise ValueError(
                f"objectives: none is at work from step {before.stop} to {after.start}; let one start or stop there"
            )
    for i, objective in enumerate(recipe.objectives):
        if objective.weight == "auto" and not follows(recipe, objective):
            raise ValueError(
                f"objectives.{i}.weight: auto follows distribution matching, which is not at work "
                f"at all its steps; give a number"
            )
    if recipe.guidance.dynamics is not None and not recipe.matching:
        raise ValueError(
            "guidance.dynamics: has no effect without an objective of kind distribution_matching; leave it out"
        )


def follows(recipe: Sections, objective: ObjectiveSection) -> bool:
    """Whether another objective matches distributions at every step of this one, so that its weight can follow."""
    span, others = objective.span(recipe.run.steps), [o for o in recipe.objectives if o is not objective]
    matching = merged(o.span(recipe.run.steps) for o in others if "fake_score" in needs(o))
    return any(span.start >= m.start and span.stop <= m.stop for m in matching)


def check_data(recipe: Sections) -> None:
    """Check that the data is what the objectives need."""
    data, pairs = recipe.data, recipe.needing("pairs")
    if pairs and data.pairs is None:
        kind = next(iter(pairs.values())).kind
        raise ValueError(f"data.pairs: is null and {kind} needs them; give a folder that dmdr-train pairs wrote")
    if pairs and len(recipe.model.sizes) > 1:
        kind = next(iter(pairs.values())).kind
        raise ValueError(
            f"model.resolution: has {len(recipe.model.sizes)} sizes and {kind} learns from pairs of one; give one size"
        )
    discriminator = recipe.guidance.discriminator
    if data.pairs is not None and not pairs and (discriminator is None or discriminator.teacher_steps is not None):
        raise ValueError("data.pairs: has no effect without an objective of kind regression; add one, or leave it out")
    if data.pictures is not None and (discriminator is None or discriminator.teacher_steps is not None):
        raise ValueError(
            "data.pictures: has no effect without a guidance.discriminator whose teacher_steps are null; set them to "
            "null, or leave it out"
        )
    if data.prompts is None:
        for key in ("name", "column", "streaming", "embeddings"):
            if getattr(data, key):
                raise ValueError(f"data.{key}: has no effect without data.prompts; give both, or leave it out")
    elif data.classes != "all":
        raise ValueError("data.classes: has no effect beside data.prompts; leave one of them out")
