"""How often a step calls each network, from the recipe alone. Imports no torch."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dmdr_train.recipe.objective_kinds import needs
from dmdr_train.recipe.schema import Recipe
from dmdr_train.recipe.step_work import predictions, updates_in_step


@dataclass(frozen=True)
class Calls:
    """Calls in a step, per sample of the batch.

    Attributes:
        updates: of the generator.
        predictions: of the networks by role, as `dmdr_train.recipe.step_work.predictions` counts them.
        decodings: forward passes of the decoder with gradient.
        decoding_backwards: backward passes through it: in each of the generator's updates one, or with automatic
            weights one of each objective.
        other_decodings: forward passes of the decoder without gradient: of targets, of final pictures, and for rewards
            without gradient.
        encodings: forward passes of the text encoders.
    """

    updates: int
    predictions: dict[str, float]
    decodings: int
    decoding_backwards: int
    other_decodings: int
    encodings: int


@dataclass(frozen=True)
class Stage:
    """Steps in which the same objectives take part."""

    name: str
    steps: int
    objectives: tuple[Any, ...]


def stages(settings: Recipe) -> list[Stage]:
    """The stages of a recipe in order, cut wherever an objective begins or ends."""
    steps = settings.run.steps
    cuts = {0, steps} | {edge for o in settings.objectives for edge in (o.start, o.stop or steps) if 0 < edge < steps}
    edges = sorted(cuts)
    found = []
    for start, stop in pairwise(edges):
        active = tuple(o for o in settings.objectives if o.active(start))
        names = [name for name, o in zip(settings.names, settings.objectives, strict=True) if o.active(start)]
        found.append(Stage(" + ".join(names) or "nothing", stop - start, active))
    return found


def in_stage(settings: Recipe, stage: Stage) -> Recipe:
    """The recipe with the objectives of a stage alone."""
    return settings.model_copy(update={"objectives": list(stage.objectives)})


def calls(settings: Recipe, stage: Stage) -> Calls:
    """The calls of a step in a stage; see `dmdr_train.training.trainer`."""
    active = in_stage(settings, stage)
    asked, updates = predictions(active), updates_in_step(active)
    pictures = [o for o in stage.objectives if uses_pictures(o)]
    followed = [o for o in pictures if takes_gradient(o)]
    decoded, apart = bool(followed), any(o.weight == "auto" for o in stage.objectives)
    alone = sum(
        "final_x0" in needs(o) and decodes(o) for o in stage.objectives
    )  # objectives that decode what they recover
    ends = any("final_pictures" in needs(o) for o in stage.objectives)  # decoded once for all
    return Calls(
        updates=updates,
        predictions=asked,
        decodings=updates * (int(decoded) + alone),
        decoding_backwards=updates * ((len(followed) if apart else int(decoded)) + alone),
        other_decodings=updates * sum(is_lpips(o) or not takes_gradient(o) for o in pictures) + ends,
        encodings=1 + (round(asked["fake_score trained"]) if settings.rollout.reuse == "none" else 0),
    )


def uses_pictures(section: Any) -> bool:
    """Whether an objective looks at the pictures of x0."""
    elsewhere = {"final_pictures", "final_x0"} & needs(section)
    return ("reward" in needs(section) and not elsewhere) or is_lpips(section)


def decodes(section: Any) -> bool:
    """Whether an objective decodes anything."""
    return "reward" in needs(section) or is_lpips(section)


def takes_gradient(section: Any) -> bool:
    """Whether an objective takes gradients at decoded pictures."""
    return "reward_gradient" in needs(section) or is_lpips(section)


def is_lpips(section: Any) -> bool:
    return getattr(getattr(section, "distance", None), "kind", None) == "lpips"
