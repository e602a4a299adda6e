"""How often a step asks each network, as a function of the recipe."""

from dmdr_train.recipe.derived import Sections
from dmdr_train.recipe.objective_kinds import needs


def predictions(recipe: Sections) -> dict[str, float]:
    """Predictions for each sample of the batch in a step, on average over the grid's steps; all objectives take part.

    Returns:
        By role: `generator`, `fake_score` and `teacher` without gradient, `generator trained` and `fake_score trained`
        with a backward pass. The teacher's predictions with and without the prompt count as two.
    """
    return _asked(recipe, (recipe.rollout.steps - 1) / 2, apart=True)


def passes(recipe: Sections, longest: float) -> dict[str, float]:
    """Forward passes of each network in a step, for samples that are computed at once; otherwise as `predictions`.

    A rollout goes on until its longest sample is there, and the teacher predicts with and without the prompt at once.

    Args:
        longest: the mean of the longest random walk among these samples, in steps of the grid.
    """
    return _asked(recipe, longest, apart=False)


def _asked(recipe: Sections, random_walk: float, apart: bool) -> dict[str, float]:
    rollout, guidance, matching = recipe.rollout, recipe.guidance, recipe.needing("fake_score")
    updates = updates_in_step(recipe)
    ratio = guidance.ratio if matching else 0
    last, authors = rollout.steps - 1, rollout.states == "authors"
    walk = random_walk if walks_at_random(recipe) else last  # up to the state that is trained at
    own = walk + authors  # the authors renoise a prediction
    new = (last if authors and rollout.mode == "ode" else own) + 1  # a sample of the fake score's
    generator = {"none": own + ratio * new, "sample": own, "states": float(rollout.steps)}[rollout.reuse]
    generator += updates * len(recipe.needing("frozen_copy"))
    if finishes(recipe):  # from the next state to the end; in step, all that follow the first
        generator += last if recipe.optim.zero_stage == 3 else random_walk
    guided = apart and (guidance.cfg > 1 or guidance.cfg_jitter > 0)
    taught = sum(section.teacher_predictions(guided) for section in matching.values())
    asked = {
        "generator": generator - (own if rollout.through else 0),
        "generator trained": updates + (own if rollout.through else 0),
        "fake_score": updates * len(matching) + (ratio if guidance.self_consistency else 0),
        "fake_score trained": ratio,
        "teacher": updates * (taught + len(recipe.needing("reference"))),
    }
    beside = discriminating(recipe, apart)
    return {role: count + updates * beside.get(role, 0) for role, count in asked.items()}


def updates_in_step(recipe: Sections) -> int:
    """Updates of the generator in a step; all objectives take part."""
    return recipe.rollout.updates if recipe.needing("final_pictures") else 1


def discriminating(recipe: Sections, apart: bool = True) -> dict[str, float]:
    """Predictions for the discriminator, whose head costs nothing beside them.

    Args:
        apart: those with and without the prompt count as two.

    It sees a real and a generated sample, and the generated one again for each objective that asks. The gradient that
    an adversarial term takes through the frozen network costs as much as one more prediction.
    """
    found, asked = recipe.guidance.discriminator, recipe.needing("discriminator")
    if found is None or not asked:
        return {}
    weighted = sum("fake_score" in needs(o) for o in asked.values())
    drawn = (found.teacher_steps or 0) * (2 if apart and recipe.guidance.drawing_cfg > 1 else 1)
    work = {"teacher": float(drawn), "fake_score": 0.0}
    work[found.features] += 2 + weighted + 2 * (len(asked) - weighted)
    return work


def finishes(recipe: Sections) -> bool:
    """Whether every rollout goes on from the next state to its end."""
    return bool(recipe.needing("final_pictures") or recipe.needing("final_x0"))


def walks_at_random(recipe: Sections) -> bool:
    """Whether the length of a rollout is drawn, so that processes may have unequal work."""
    rollout = recipe.rollout
    to_the_end = recipe.optim.zero_stage == 3 or bool(recipe.needing("final_sample"))
    return not (to_the_end or rollout.reuse == "states" or (rollout.states == "authors" and rollout.mode == "ode"))
