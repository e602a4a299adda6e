"""How often a step asks each network, as a function of the recipe."""

from dmdr_train.recipe.derived import Sections


def predictions(recipe: Sections) -> dict[str, float]:
    """Predictions for each sample of the batch in a step, on average over the grid's steps; all objectives take part.

    Returns:
        By role: `generator`, `fake_score` and `teacher` without gradient, `generator trained` and `fake_score trained`
        with a backward pass. The teacher's predictions with and without the prompt count as two.
    """
    rollout, guidance, matching = recipe.rollout, recipe.guidance, recipe.needing("fake_score")
    ratio = guidance.ratio if matching else 0
    last, authors = rollout.steps - 1, rollout.states == "authors"
    walk = last / 2 if walks_at_random(recipe) else last  # up to the state that is trained at
    own = walk + authors  # the authors renoise a prediction
    new = (last if authors and rollout.mode == "ode" else own) + 1  # a sample of the fake score's
    generator = {"none": own + ratio * new, "sample": own, "states": float(rollout.steps)}[rollout.reuse]
    if finishes(recipe):  # from the next state to the end; in step, all that follow the first
        generator += last if recipe.optim.zero_stage == 3 else last / 2
    guided = guidance.cfg > 1 or guidance.cfg_jitter > 0
    return {
        "generator": generator,
        "generator trained": 1,
        "fake_score": len(matching) + (ratio if guidance.self_consistency else 0),
        "fake_score trained": ratio,
        "teacher": sum(section.teacher_predictions(guided) for section in matching.values())
        + len(recipe.needing("reference")),
    }


def finishes(recipe: Sections) -> bool:
    """Whether every rollout goes on from the next state to its end."""
    return bool(recipe.needing("final_pictures") or recipe.needing("final_x0"))


def walks_at_random(recipe: Sections) -> bool:
    """Whether the length of a rollout is drawn, so that processes may have unequal work."""
    rollout = recipe.rollout
    to_the_end = recipe.optim.zero_stage == 3 or bool(recipe.needing("final_sample"))
    return not (to_the_end or rollout.reuse == "states" or (rollout.states == "authors" and rollout.mode == "ode"))
