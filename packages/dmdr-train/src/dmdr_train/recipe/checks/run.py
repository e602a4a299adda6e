"""What memory, checkpoints, early warning and evaluation can be together."""

from dmdr_rewards.compare.feature_names import CLASSIFIERS

from dmdr_train.base.plugins import nearest_name
from dmdr_train.recipe.derived import Sections
from dmdr_train.recipe.tracking_sections import DRAWN, EVALUATED


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
    rewards = recipe.needing("reward") if found.rewards is True else found.rewards  # true may find none to take
    if not (found.reference or found.classifier or rewards or found.per_prompt > 1):
        raise ValueError(f"{key}: measures nothing; give rewards, a reference, or 2 or more as per_prompt")
