"""What cannot be trained on a network with quantised weights, whoever quantised them."""

from typing import Any

from dmdr_train.recipe.derived import Sections


def check_quantize(recipe: Sections) -> None:
    """Check that a network that is quantised for the training only carries adapters.

    Raises:
        ValueError: "memory.quantize: what does not go with it; how to mend it".
    """
    kind = recipe.memory.quantize
    for what, fix in obstacles(recipe) if kind is not None else ():
        raise ValueError(f"memory.quantize: {kind} does not go with {what}; {fix}, or use null")


def check_quantised_folder(recipe: Sections, method: str, keeps_lora: bool = True) -> None:
    """Check that a network that comes with quantised weights only carries adapters.

    Args:
        method: the library that quantised the weights in `model.path`.
        keeps_lora: whether the family's students are LoRAs of their own.

    Raises:
        ValueError: what does not go with them, and how to mend it.
    """
    found = obstacles(recipe)
    if recipe.memory.quantize is not None:
        found.append((f"memory.quantize {recipe.memory.quantize}", "use null"))
    if recipe.model.teacher_loras:
        found.append(("model.teacher_loras, which are added to the teacher's weights", "leave them out"))
    if not keeps_lora:
        found.append((f"family {recipe.model.family}, whose students have the LoRA in their weights", "use another"))
    for what, fix in found:
        raise ValueError(
            f"{recipe.model.path} has quantised weights ({method}), which do not go with {what}; {fix}, or give the "
            "folder of the weights before quantisation"
        )


def obstacles(recipe: Sections) -> list[tuple[str, str]]:
    """What in a recipe needs weights that are not quantised, each with what to do instead."""
    model, loras = recipe.model, {"generator": recipe.model.generator_lora, "fake_score": recipe.model.fake_score_lora}
    found: list[tuple[Any, str, str]] = [
        (model.generator_lora is None, "a generator whose own weights are trained", "set model.generator_lora"),
        (model.generator is not None, f"model.generator {model.generator}", "leave that out"),
        (recipe.optim.zero_stage == 3, "optim.zero_stage 3", "use 2"),
        (recipe.memory.shared_backbone is False, "memory.shared_backbone false", "use shared_backbone null"),
        *(
            (lora and lora.init == "output_gaussian", f"model.{role}_lora.init output_gaussian", "use gaussian")
            for role, lora in loras.items()
        ),
    ]
    return [(what, fix) for at_fault, what, fix in found if at_fault]
