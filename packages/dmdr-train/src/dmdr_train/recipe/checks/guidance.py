"""What the teacher, the fake score and the discriminator can be together."""

from dmdr_models import registry

from dmdr_train.recipe.derived import Sections


def check_guidance(recipe: Sections) -> None:
    """Check the guidance of the teacher."""
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


def check_backbone(recipe: Sections) -> None:
    if not recipe.memory.shared_backbone:
        return
    if recipe.model.generator_lora is None:
        raise ValueError("memory.shared_backbone: true needs model.generator_lora; set it, or use null")
    if recipe.optim.zero_stage == 3:
        raise ValueError("memory.shared_backbone: true does not go with optim.zero_stage 3; use 2, or null")
    if recipe.model.generator is not None:
        raise ValueError("memory.shared_backbone: true does not go with a model.generator of its own; use null")


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
    if found.teacher_steps is None and recipe.data.pairs is None and recipe.data.pictures is None:
        raise ValueError(
            "guidance.discriminator.teacher_steps: is null without data.pictures or data.pairs, the real samples; "
            "give one of them"
        )
    if found.teacher_steps is None and len(recipe.model.sizes) > 1:
        raise ValueError(
            "guidance.discriminator.teacher_steps: is null, and real samples on disk have one of the several sizes of "
            "model.resolution; give steps"
        )
    if recipe.optim.zero_stage == 3:
        raise ValueError("guidance.discriminator: does not go with optim.zero_stage 3; use 2, or leave it out")
    if recipe.memory.compile:
        raise ValueError(
            "memory.compile: true does not go with guidance.discriminator, which reads the features of a block; "
            "use false"
        )
