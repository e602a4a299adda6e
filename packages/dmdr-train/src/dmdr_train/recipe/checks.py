"""What cannot be in one recipe together. Each check raises a ValueError "KEY: what is wrong; how to mend it"."""

from dmdr_models import registry
from dmdr_rewards.compare.feature_names import CLASSIFIERS

from dmdr_train.base.plugins import nearest_name
from dmdr_train.recipe.derived import Sections, merged
from dmdr_train.recipe.objective_kinds import needs
from dmdr_train.recipe.quantised_base import check_quantize
from dmdr_train.recipe.sections import ObjectiveSection
from dmdr_train.recipe.tracking_sections import DRAWN, EVALUATED


def check(recipe: Sections) -> None:
    """Check all combinations.

    Raises:
        ValueError: for the first that cannot be.
    """
    guidance = recipe.guidance
    if guidance.cfg_jitter and guidance.cfg - guidance.cfg_jitter < 1:
        raise ValueError(
            f"guidance.cfg_jitter: {guidance.cfg_jitter} takes guidance.cfg {guidance.cfg} below 1; "
            f"use at most {guidance.cfg - 1:g}"
        )
    if guidance.unconditional == "empty_text" and registry.find(recipe.model.family).takes == "labels":
        raise ValueError(
            f"guidance.unconditional: empty_text does not go with family {recipe.model.family}, which takes class "
            f"labels; use model"
        )
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
    if data.prompts is None:
        for key in ("name", "column", "streaming", "embeddings"):
            if getattr(data, key):
                raise ValueError(f"data.{key}: has no effect without data.prompts; give both, or leave it out")
    elif data.classes != "all":
        raise ValueError("data.classes: has no effect beside data.prompts; leave one of them out")


def check_groups(recipe: Sections) -> None:
    """Check that samples come in groups exactly where an objective compares the samples of a prompt."""
    size, grouped = recipe.rollout.group_size, recipe.needing("groups")
    if grouped and size == 1:
        kind = next(iter(grouped.values())).kind
        raise ValueError(f"rollout.group_size: is 1 and {kind} compares the samples of a prompt; use 2 or more")
    if size > 1 and not grouped:
        raise ValueError(f"rollout.group_size: {size} has no effect, since no objective compares samples; use 1")
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


def check_backbone(recipe: Sections) -> None:
    if not recipe.memory.shared_backbone:
        return
    if recipe.model.generator_lora is None:
        raise ValueError("memory.shared_backbone: true needs model.generator_lora; set it, or use null")
    if recipe.optim.zero_stage == 3:
        raise ValueError("memory.shared_backbone: true does not go with optim.zero_stage 3; use 2, or null")
    if recipe.model.generator is not None:
        raise ValueError("memory.shared_backbone: true does not go with a model.generator of its own; use null")


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
    for kind in (o.kind for o in recipe.needing("final_pictures").values()):
        raise ValueError(
            f"{key}: true does not go with {kind}, which takes the state before a step as given; use false"
        )


def check_alignment(recipe: Sections) -> None:
    """Check that the fake score can move toward the generator: both are changes of the same weights."""
    if recipe.guidance.alignment is None:
        return
    if not recipe.matching:
        raise ValueError(
            "guidance.alignment: has no effect without an objective that matches distributions; leave it out"
        )
    if recipe.model.generator is not None and recipe.model.generator_lora is not None:
        raise ValueError(
            "guidance.alignment: does not go with a model.generator_lora on a model.generator of its own, since the "
            "fake score is on the teacher; use null"
        )


def check_discriminator(recipe: Sections) -> None:
    """Check that there is a discriminator exactly where an objective needs it, and that it has its real samples."""
    found, asked = recipe.guidance.discriminator, recipe.needing("discriminator")
    if asked and found is None:
        kind = next(iter(asked.values())).kind
        raise ValueError(f"guidance.discriminator: is null and {kind} needs it; give one, {{}} for all defaults")
    if found is None:
        return
    if not asked:
        raise ValueError("guidance.discriminator: has no effect without an objective such as adversarial; leave it out")
    if found.teacher_steps is None and recipe.data.pairs is None:
        raise ValueError(
            "guidance.discriminator.teacher_steps: is null without data.pairs, the real samples; give one of them"
        )
    if found.teacher_steps is None and len(recipe.model.sizes) > 1:
        raise ValueError(
            "guidance.discriminator.teacher_steps: is null, and pairs have one of the several sizes of "
            "model.resolution; give steps"
        )
    if recipe.optim.zero_stage == 3:
        raise ValueError("guidance.discriminator: does not go with optim.zero_stage 3; use 2, or leave it out")
    if recipe.memory.compile:
        raise ValueError(
            "memory.compile: true does not go with guidance.discriminator, which reads the features of a block; "
            "use false"
        )


def check_precision(recipe: Sections) -> None:
    """Check that TF32 has something to do."""
    optim = recipe.optim
    if optim.tf32 and optim.precision != "fp32":
        raise ValueError(f"optim.tf32: true has no effect with optim.precision {optim.precision}; use false")


def check_memory(recipe: Sections) -> None:
    """Check that the optimizer's updates and a compiled network have their weights where they need them."""
    memory, optim = recipe.memory, recipe.optim
    if memory.offload_optimizer and optim.eight_bit:
        raise ValueError(
            "memory.offload_optimizer: true does not go with optim.eight_bit, which updates weights on a GPU only; "
            "set one of them to false"
        )
    if memory.offloaded_adam != "torch" and not memory.offload_optimizer:
        raise ValueError(
            f"memory.offloaded_adam: {memory.offloaded_adam} has no effect without memory.offload_optimizer; "
            "set it to true, or use torch"
        )
    if memory.channels_last and optim.zero_stage == 3:
        raise ValueError(
            "memory.channels_last: true does not go with optim.zero_stage 3, which stores all weights flat; "
            "use stage 2, or false"
        )
    if memory.compile and optim.zero_stage == 3:
        raise ValueError(
            "memory.compile: true does not go with optim.zero_stage 3, which fetches the weights within a block; "
            "use stage 2, or false"
        )


def check_start(recipe: Sections) -> None:
    """Check that the generator's LoRA starts from one place."""
    lora = recipe.model.generator_lora
    if lora is not None and lora.start is not None and recipe.run.init_from is not None:
        raise ValueError("model.generator_lora.start: has no effect beside run.init_from; leave one of them out")


def check_keeping(recipe: Sections) -> None:
    """Check which checkpoints are kept."""
    run, evaluation = recipe.run, recipe.tracking.evaluation
    if run.init_moments and run.init_from is None:
        raise ValueError("run.init_moments: true has no effect without run.init_from; give one, or use false")
    if run.keep_every and (not run.checkpoint_every or run.keep_every % run.checkpoint_every):
        raise ValueError(
            f"run.keep_every: {run.keep_every} must be a multiple of run.checkpoint_every {run.checkpoint_every}; "
            f"change one of them"
        )
    if run.keep_best is None:
        return
    watched = [n for n in recipe.watched if n.startswith(("diversity", "held_out/", "trained/"))]
    scored = evaluation.measured if evaluation else EVALUATED
    if run.keep_best in scored:
        key, every = "tracking.evaluation.every", evaluation.every if evaluation else 0
    elif run.keep_best in watched:
        key, every = "watch.every", recipe.watch.every
    else:
        hint = nearest_name(run.keep_best, [*scored, *watched])
        raise ValueError(f"run.keep_best: {run.keep_best!r} is not measured here; {hint}")
    if not every or not run.checkpoint_every or every % run.checkpoint_every:
        raise ValueError(
            f"run.keep_best: {run.keep_best} needs {key} to be a multiple of run.checkpoint_every; "
            f"set both, or use null"
        )


def check_watch(recipe: Sections) -> None:
    """Check that early warning can judge what it is asked to."""
    watch, trained = recipe.watch, [o.reward for o in recipe.needing("reward").values()]
    if watch.every == 0 and (watch.rewards or watch.rules):
        key = "rewards" if watch.rewards else "rules"
        raise ValueError(f"watch.{key}: has no effect with watch.every 0; give steps, or leave it out")
    for i, reward in enumerate(watch.rewards):
        if any(reward.same_as(other) for other in trained):
            raise ValueError(
                f"watch.rewards.{i}: {reward.checkpoint or reward.name} is trained on by an objective and cannot "
                f"be held out; give another reward"
            )
    for i, rule in enumerate(watch.rules or []):
        if lacking := recipe.lacking(rule):
            raise ValueError(f"watch.rules.{i}{lacking}")


def check_evaluation(recipe: Sections) -> None:
    """Check that the evaluation has something to measure, and everything that it needs for this."""
    found, key = recipe.tracking.evaluation, "tracking.evaluation"
    if found is None:
        return
    if found.reference is not None and found.classifier is None and found.features is None:
        raise ValueError(
            f"{key}.classifier: is null and the reference {found.reference} is compared by features; "
            f"give a classifier, or {key}.features"
        )
    if found.per_prompt > 1 and not found.prompt_files:
        raise ValueError(f"{key}.per_prompt: {found.per_prompt} has no effect without prompt_files; use 1")
    if found.prompt_files and found.reference in DRAWN:
        raise ValueError(f"{key}.prompt_files: {found.reference} has its own prompts; leave one of them out")
    if found.labels == "drawn" and (found.prompt_files or found.has_pictures):
        cause = "beside prompt_files" if found.prompt_files else f"beside the reference {found.reference}"
        raise ValueError(f"{key}.labels: drawn has no effect {cause}, which gives the labels; use in_turn")
    if found.per_prompt > found.pictures:
        raise ValueError(f"{key}.per_prompt: {found.per_prompt} is more than all pictures {found.pictures}; use fewer")
    compared = found.reference is not None or found.per_prompt > 1
    if found.features is not None and not compared and found.features.name not in CLASSIFIERS:
        name = found.features.name
        raise ValueError(f"{key}.features: {name} has no effect without a reference or 2 per_prompt; leave it out")
    if found.rewards is True and not recipe.needing("reward"):
        raise ValueError(f"{key}.rewards: true takes the rewards that are trained on, and there is none; give a list")
    if not (found.reference or found.classifier or found.rewards or found.per_prompt > 1):
        raise ValueError(f"{key}: measures nothing; give rewards, a reference, or 2 or more as per_prompt")
