"""The rules of early warning: their sections in a recipe, and the thresholds of the default rules."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dmdr_train.recipe.fields import Fraction, Natural, Positive, Section


class Rule(Section):
    """Judged after every evaluation of `watch`; `dmdr_train.monitoring.rules` says how."""

    action: Literal["warn", "stop"] = Field(
        default="warn", description="stop: save a checkpoint and end the run with exit code 4"
    )
    evaluations: Positive = Field(default=3, description="in a row at which it must hold")
    start: Natural | None = Field(
        default=None, description="evaluations after this step count; null: after the step at which a reward joins"
    )


class RewardHacking(Rule):
    """A trained reward rises while every held-out reward and the diversity fall."""

    kind: Literal["reward_hacking"]
    fall: Fraction = Field(default=0.1, description="share of the diversity that must be lost over these evaluations")


class Limit(Rule):
    """A metric is above or below a number, as it is or as a share of the teacher's or of its own first value."""

    kind: Literal["limit"]
    metric: str
    above: float | None = None
    below: float | None = None
    relative_to: Literal["teacher", "first"] | None = None

    @model_validator(mode="after")
    def _one_side(self) -> "Limit":
        if (self.above is None) == (self.below is None):
            raise ValueError("a limit has one of above and below; give the other a rule of its own")
        return self


AnyRule = Annotated[RewardHacking | Limit, Field(discriminator="kind")]

DEFAULT_RULES: list[AnyRule] = [
    RewardHacking(kind="reward_hacking"),
    Limit(kind="limit", metric="diversity", below=0.6, relative_to="teacher"),
    Limit(kind="limit", metric="saturation", above=1.5, relative_to="teacher"),
    Limit(kind="limit", metric="contrast", above=1.5, relative_to="teacher"),
    Limit(kind="limit", metric="drift/mean", above=1.0),
    Limit(kind="limit", metric="drift/std", above=0.5),
]
"""The rules of a recipe that gives none; those apply whose metrics there are."""
