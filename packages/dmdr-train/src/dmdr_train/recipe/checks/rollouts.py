"""What a rollout can be together with the objectives and the networks."""

from dmdr_models import registry

from dmdr_train.recipe.derived import Sections


def check_groups(recipe: Sections) -> None:
    """Check that samples come in groups exactly where an objective compares the samples of a prompt."""
    size, grouped = recipe.rollout.group_size, recipe.needing("groups")
    if grouped and size == 1:
        kind = next(iter(grouped.values())).kind
        raise ValueError(f"rollout.group_size: is 1 and {kind} compares the samples of a prompt; use 2 or more")
    if size > 1 and not grouped:
        raise ValueError(f"rollout.group_size: {size} has no effect, since no objective compares samples; use 1")
    compared = grouped.keys() & (recipe.needing("final_pictures") | recipe.needing("final_x0")).keys()
    if recipe.rollout.group_noise != "own" and not compared:
        raise ValueError(
            f"rollout.group_noise: {recipe.rollout.group_noise} has no effect without an objective such as grpo, which "
            f"compares the ends of rollouts; use own"
        )
    if grouped and recipe.needing("pairs"):
        raise ValueError("data.pairs: do not come in groups; leave one of the objectives out")


def check_updates(recipe: Sections) -> None:
    """Check that an objective can train several times on the samples of a rollout."""
    updates = recipe.rollout.updates
    if updates > 1 and not recipe.needing("final_pictures"):
        raise ValueError(
            f"rollout.updates: {updates} has no effect without an objective on final pictures such as grpo; use 1"
        )


def check_mode(recipe: Sections) -> None:
    """Check that the share of fresh noise, and noise between steps, have an effect."""
    rollout = recipe.rollout
    if rollout.eta is not None and rollout.mode != "cps":
        raise ValueError(f"rollout.eta: {rollout.eta} has no effect with rollout.mode {rollout.mode}; use mode cps")
    if rollout.mode == "cps" and rollout.steps == 1:
        raise ValueError("rollout.mode: cps has no effect with one step; use sde, or 2 or more in rollout.steps")


def check_reuse(recipe: Sections) -> None:
    """Check that the generator's samples can serve the fake score."""
    rollout = recipe.rollout
    if rollout.reuse == "none":
        return
    if not recipe.matching:
        raise ValueError(
            f"rollout.reuse: {rollout.reuse} has no effect without an objective of kind distribution_matching; use none"
        )
    if rollout.states == "authors":
        raise ValueError(
            f"rollout.reuse: {rollout.reuse} does not go with rollout.states authors, which gives the two networks "
            f"different samples; use none"
        )
    if rollout.reuse == "states" and rollout.steps == 1:
        raise ValueError("rollout.reuse: states needs more than 1 in rollout.steps; use sample")
    final = recipe.needing("final_sample")
    if rollout.reuse == "states" and final:
        kind = next(iter(final.values())).kind
        raise ValueError(f"rollout.reuse: states does not go with {kind}, which needs the final sample; use sample")


def check_renoising(recipe: Sections) -> None:
    """Check that there are next states to renoise, which training and the fake score share."""
    guidance, rollout, key = recipe.guidance, recipe.rollout, "guidance.renoise_from"
    if guidance.renoise_from == "x0":
        if guidance.consistency is not None:
            raise ValueError(
                f"guidance.consistency: {guidance.consistency} has no effect with renoise_from x0; "
                f"set {key}: next_state, or leave it out"
            )
        return
    if not recipe.matching:
        raise ValueError(f"{key}: next_state has no effect without an objective that matches distributions; use x0")
    if registry.find(recipe.model.family).predicts != "velocity":
        raise ValueError(f"{key}: next_state needs flow matching, which family {recipe.model.family} is not; use x0")
    if rollout.steps == 1:
        raise ValueError(f"{key}: next_state has no effect with rollout.steps 1, which goes to x0; use x0")
    if rollout.states == "authors":
        raise ValueError(f"{key}: next_state does not go with rollout.states authors; use visited, or x0")


def check_steps_apart(recipe: Sections) -> None:
    """Check that there are steps for LoRAs of their own, and that nothing needs the student as one network."""
    lora, model = recipe.model.generator_lora, recipe.model
    if lora is None or not lora.per_step:
        return
    key, memory, zero = "model.generator_lora.per_step", recipe.memory, recipe.optim.zero_stage
    if recipe.rollout.steps == 1:
        raise ValueError(f"{key}: true has no effect with rollout.steps 1; use 2 or more steps, or false")
    final = recipe.needing("final_sample")
    if final and not recipe.rollout.through:
        kind = next(iter(final.values())).kind
        raise ValueError(f"{key}: {kind} trains the last step alone; set rollout.through: true")
    for on, what, fix in (
        (registry.find(model.family).takes == "labels", f"family {model.family}, which keeps no LoRA", "use false"),
        (lora.start is not None, "model.generator_lora.start, which is one LoRA", "leave it out"),
        (model.generator is not None, "a model.generator of its own", "leave it out"),
        (bool(model.teacher_loras), "model.teacher_loras, into which the student would be merged", "leave them out"),
        (memory.shared_backbone is False, "memory.shared_backbone: false", "use null"),
        (memory.quantize is not None, "memory.quantize", "use null"),
        (memory.compile, "memory.compile", "use false"),
        (zero > 0, f"optim.zero_stage {zero}, which needs the same gradients on all processes", "use 0"),
        (recipe.guidance.alignment is not None, "guidance.alignment, which follows one LoRA", "use null"),
        (recipe.run.init_from is not None, "run.init_from", "leave it out"),
    ):  # fmt: skip
        if on:
            raise ValueError(f"{key}: true does not go with {what}; {fix}")


def check_through(recipe: Sections) -> None:
    """Check that there are earlier steps for gradients to flow through, and that the objectives allow it."""
    rollout, key = recipe.rollout, "rollout.through"
    if not rollout.through:
        return
    if rollout.steps == 1:
        raise ValueError(f"{key}: true has no effect with rollout.steps 1; use 2 or more steps, or false")
    if rollout.states == "authors":
        raise ValueError(f"{key}: true does not go with rollout.states authors; use visited")
    if rollout.reuse == "states":
        raise ValueError(f"{key}: true does not go with rollout.reuse states; use sample, or none")
    if recipe.optim.zero_stage:
        raise ValueError(f"{key}: true does not go with optim.zero_stage {recipe.optim.zero_stage}; use 0")
    if recipe.memory.compile:
        raise ValueError(f"{key}: true does not go with memory.compile; use false")
    for kind in (o.kind for o in (recipe.needing("final_pictures") | recipe.needing("group_positions")).values()):
        raise ValueError(
            f"{key}: true does not go with {kind}, which takes the state before a step as given; use false"
        )
