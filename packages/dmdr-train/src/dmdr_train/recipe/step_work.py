"""How often a step asks each network, as a function of the recipe."""

from dmdr_train.recipe.derived import Sections
from dmdr_train.recipe.objective_kinds import needs


def predictions(recipe: Sections) -> dict[str, float]:
    """Predictions for each sample of the batch in a step, on average over the grid's steps; all objectives take part.

    Returns:
        By role: `generator`, `fake_score` and `teacher` without gradient, `generator trained` and `fake_score trained`
        with a backward pass. The teacher's predictions with and without the prompt count as two.
    """
    rollout, guidance, matching = recipe.rollout, recipe.guidance, recipe.needing("fake_score")
    updates = updates_in_step(recipe)
    ratio = guidance.ratio if matching else 0
    last, authors = rollout.steps - 1, rollout.states == "authors"
    walk = last / 2 if walks_at_random(recipe) else last  # up to the state that is trained at
    own = walk + authors  # the authors renoise a prediction
    new = (last if authors and rollout.mode == "ode" else own) + 1  # a sample of the fake score's
    generator = {"none": own + ratio * new, "sample": own, "states": float(rollout.steps)}[rollout.reuse]
    generator += updates * len(recipe.needing("frozen_copy"))
    if finishes(recipe):  # from the next state to the end; in step, all that follow the first
        generator += last if recipe.optim.zero_stage == 3 else last / 2
    guided = guidance.cfg > 1 or guidance.cfg_jitter > 0
    taught = sum(section.teacher_predictions(guided) for section in matching.values())
    asked = {
        "generator": generator - (own if rollout.through else 0),
        "generator trained": updates + (own if rollout.through else 0),
        "fake_score": updates * len(matching) + (ratio if guidance.self_consistency else 0),
        "fake_score trained": ratio,
        "teacher": updates * (taught + len(recipe.needing("reference"))),
    }
    beside = discriminating(recipe)
    return {role: count + updates * beside.get(role, 0) for role, count in asked.items()}


def updates_in_step(recipe: Sections) -> int:
    """Updates of the generator in a step; all objectives take part."""
    return recipe.rollout.updates if recipe.needing("final_pictures") else 1


def discriminating(recipe: Sections) -> dict[str, float]:
    """Predictions for the discriminator, whose head costs nothing beside them.

    It sees a real and a generated sample, and the generated one again for each objective that asks. The gradient that
    an adversarial term takes through the frozen network costs as much as one more prediction.
    """
    found, asked = recipe.guidance.discriminator, recipe.needing("discriminator")
    if found is None or not asked:
        return {}
    weighted = sum("fake_score" in needs(o) for o in asked.values())
    drawn = (found.teacher_steps or 0) * (2 if recipe.guidance.drawing_cfg > 1 else 1)
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
