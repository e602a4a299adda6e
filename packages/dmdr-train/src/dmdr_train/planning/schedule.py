"""How often a step calls each network, from the recipe alone. Imports no torch."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dmdr_train.recipe.objective_kinds import needs
from dmdr_train.recipe.schema import Recipe


@dataclass(frozen=True)
class Calls:
    """Calls in a step, per sample of the batch. A call of the teacher with guidance has two rows per sample.

    Attributes:
        rollout: forward passes of the generator without gradient; the mean over the positions in the grid.
        generator: forward and backward passes of the generator.
        fake_predictions: forward passes of the fake score without gradient.
        fake_updates: forward and backward passes of the fake score.
        teacher: rows of the teacher's forward passes.
        decodings: forward passes of the decoder with gradient.
        decoding_backwards: backward passes through it: one, or with automatic weights one of each objective.
        target_decodings: forward passes of the decoder without gradient.
        encodings: forward passes of the text encoders.
    """

    rollout: float
    generator: int
    fake_predictions: int
    fake_updates: int
    teacher: int
    decodings: int
    decoding_backwards: int
    target_decodings: int
    encodings: int


@dataclass(frozen=True)
class Stage:
    """Steps in which the same objectives take part."""

    name: str
    steps: int
    objectives: tuple[Any, ...]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(need for section in self.objectives for need in needs(section))


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


def calls(settings: Recipe, stage: Stage) -> Calls:
    """The calls of a step in a stage; see `dmdr_train.training.trainer` and `dmdr_train.training.rollouts`."""
    matching = "fake_score" in stage.needs
    ratio = settings.guidance.ratio if matching else 0
    own = reuse(settings) == "none"
    guided = settings.guidance.cfg != 1.0 or settings.guidance.cfg_jitter > 0
    pictures = [o for o in stage.objectives if uses_pictures(o)]
    decoded, apart = bool(pictures), any(o.weight == "auto" for o in stage.objectives)
    return Calls(
        rollout=walk(settings, stage) + (ratio * fake_walk(settings, stage) if own else 0),
        generator=1,
        fake_predictions=int(matching),
        fake_updates=ratio,
        teacher=(1 + guided) * matching,
        decodings=int(decoded),
        decoding_backwards=len(pictures) if apart else int(decoded),
        target_decodings=sum(is_lpips(o) for o in pictures),
        encodings=1 + (ratio if own else 0),
    )


def reuse(settings: Recipe) -> str:
    """The recipe's `rollout.reuse`: which updates share a rollout."""
    return str(getattr(settings.rollout, "reuse", "none"))


def walk(settings: Recipe, stage: Stage) -> float:
    """Forward passes without gradient before the generator's own prediction."""
    rollout, most = settings.rollout, settings.rollout.steps - 1
    if reuse(settings) == "states":
        return rollout.steps
    to_the_end = "final_sample" in stage.needs or settings.optim.zero_stage == 3
    mean = float(most) if to_the_end else most / 2
    if rollout.states == "authors":
        return (most if rollout.mode == "ode" else mean) + 1
    return mean


def fake_walk(settings: Recipe, stage: Stage) -> float:
    """Forward passes of the generator for one update of the fake score."""
    if settings.rollout.states == "authors" and settings.rollout.mode == "ode":
        return settings.rollout.steps
    return walk(settings, stage) + 1


def uses_pictures(section: Any) -> bool:
    """Whether an objective looks at decoded pictures."""
    return "reward" in needs(section) or is_lpips(section)


def is_lpips(section: Any) -> bool:
    return getattr(getattr(section, "distance", None), "kind", None) == "lpips"
