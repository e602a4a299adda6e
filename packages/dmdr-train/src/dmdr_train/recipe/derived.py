"""Values that follow from a recipe: names in logs, stages, what is measured, which rules are in force."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import Field

from dmdr_train.base.plugins import nearest_name
from dmdr_train.recipe.alarm_rules import DEFAULT_RULES, AnyRule, RewardHacking
from dmdr_train.recipe.fields import Section
from dmdr_train.recipe.guidance_sections import Guidance
from dmdr_train.recipe.objective_kinds import AnyObjective, needs
from dmdr_train.recipe.sections import (
    Data,
    Memory,
    Model,
    Optim,
    Rollout,
    Run,
)
from dmdr_train.recipe.tracking_sections import Tracking, Watch


class Sections(Section):
    """The sections of a recipe, and what follows from them."""

    model: Model
    data: Data = Data()
    rollout: Rollout = Rollout()
    objectives: Annotated[list[AnyObjective], Field(min_length=1)]
    guidance: Guidance = Guidance()
    optim: Optim
    memory: Memory = Memory()
    run: Run
    tracking: Tracking = Tracking()
    watch: Watch = Watch()

    # -- objectives

    @property
    def names(self) -> list[str]:
        """What logs call the objectives: by their kind, numbered where there are several of one kind."""
        return numbered([o.kind for o in self.objectives])

    def needing(self, need: str) -> dict[str, Any]:
        """The sections of the objectives that have a need, by the objectives' names."""
        return {name: o for name, o in zip(self.names, self.objectives, strict=True) if need in needs(o)}

    @property
    def matching(self) -> list[range]:
        """The steps in which an objective matches distributions, so that the fake score is trained."""
        return merged(o.span(self.run.steps) for o in self.needing("fake_score").values())

    @property
    def generator_updates(self) -> int:
        """The updates of the generator in the run: one in every step, and more where objectives train on rollouts."""
        repeated = merged(o.span(self.run.steps) for o in self.needing("final_pictures").values())
        return self.run.steps + (self.rollout.updates - 1) * sum(map(len, repeated))

    @property
    def first_reward(self) -> int | None:
        """The step at which the first reward joins."""
        return min((o.start for o in (self.needing("reward") | self.needing("groups")).values()), default=None)

    @property
    def stages(self) -> dict[str, int]:
        """The step at which each stage ends, by its name, in order.

        The name tells which objectives join at the stage's start: regression, or cold start, which is distribution
        matching alone. Where all rewards join at one step, the stage from there on is the joint stage. Where they join
        at several steps, each stage has the names of the rewards that joined. An adversarial term makes no stage of its
        own.
        """
        kinds: dict[int, list[str]] = {}
        rewards: dict[int, list[str]] = {}
        accompanying = [o for o in self.objectives if needs(o) == {"discriminator"}]
        alone = len(accompanying) == len(self.objectives)
        for objective in sorted(self.objectives, key=lambda o: o.start):
            if objective in accompanying and not alone:
                continue
            kinds.setdefault(objective.start, []).append(
                "cold_start" if "fake_score" in needs(objective) else objective.kind
            )
            if {"reward", "groups"} & needs(objective):  # groups compare rewards, be they the discriminator's
                rewards.setdefault(objective.start, []).append(objective.kind)
        names: dict[int, str] = {}
        for start, joined in kinds.items():
            if start not in rewards:
                name = "_".join(sorted(set(joined), key=lambda kind: (kind == "cold_start", kind)))
            elif len(rewards) == 1:
                name = "joint"
            else:
                name = "_".join(dict.fromkeys(rewards[start]))
            names[start] = f"{name}_{start}" if name in names.values() else name
        ends = [*list(names)[1:], self.run.steps]
        return dict(zip(names.values(), ends, strict=True))

    def logged(self, step: int) -> bool:
        """Whether the values of a step are logged; steps count from 1 here."""
        looked = self.watch.every and step % self.watch.every == 0
        return bool(looked) or step % self.tracking.log_every == 0 or step == self.run.steps

    # -- networks

    @property
    def shares_backbone(self) -> bool:
        """Whether generator and fake score are two adapters on one network."""
        if self.memory.shared_backbone is not None:
            return self.memory.shared_backbone
        return self.model.generator_lora is not None and self.optim.zero_stage < 3 and self.model.generator is None

    @property
    def lora_per_step(self) -> bool:
        """Whether every step of the rollout has a LoRA of its own."""
        return self.model.generator_lora is not None and self.model.generator_lora.per_step

    @property
    def lora_stands_alone(self) -> bool:
        """Whether the student is a LoRA that fits the weights at `model.path` as they are."""
        model = self.model
        return model.generator_lora is not None and model.generator is None and not model.teacher_loras

    # -- early warning

    @property
    def held_out(self) -> list[str]:
        """What logs call the held-out rewards."""
        return numbered([reward.name for reward in self.watch.rewards])

    @property
    def watched(self) -> list[str]:
        """What an evaluation of `watch` measures, as rules call it; see `dmdr_train.monitoring.measures`."""
        trained = list(self.needing("reward"))
        seen = ["diversity", "saturation", "contrast"]
        seen += [f"trained/{name}" for name in trained] + [f"held_out/{name}" for name in self.held_out]
        return [
            *seen,
            *(f"teacher/{name}" for name in seen),
            "drift/mean",
            "drift/std",
            "fake_score_ratio",
            *(f"grad_norm/{name}" for name in ("generator", "fake_score", *self.names)),
            *(f"past_margin/{name}" for name, o in self.needing("reward").items() if hasattr(o, "margin")),
        ]

    @property
    def rules(self) -> list[AnyRule]:
        """The rules in force, with their start: those of the recipe, or the default rules that this run can judge."""
        given = DEFAULT_RULES if self.watch.rules is None else self.watch.rules
        return [
            rule if rule.start is not None else rule.model_copy(update={"start": self.first_reward})
            for rule in given
            if not self.lacking(rule)
        ]

    def lacking(self, rule: AnyRule) -> str:
        """Why a rule can never warn in this run, as key and message; empty if it can."""
        if rule.start is None and self.first_reward is None:
            return ".start: is null and no reward ever joins; give a step"
        if isinstance(rule, RewardHacking):
            kinds = {name.partition("/")[0] for name in self.watched}
            return "" if {"trained", "held_out"} <= kinds else ": needs a reward to hold out; give one in watch.rewards"
        if rule.metric not in self.watched:
            return f".metric: {rule.metric!r} is not measured here; {nearest_name(rule.metric, self.watched)}"
        if rule.relative_to == "teacher" and f"teacher/{rule.metric}" not in self.watched:
            return f".relative_to: {rule.metric} is not measured of the teacher; use first, or null"
        if rule.relative_to is not None and rule.metric.startswith(("trained/", "held_out/")):
            return f".relative_to: {rule.relative_to} says nothing of a reward, whose zero is arbitrary; use null"
        return ""


def numbered(names: Sequence[str]) -> list[str]:
    """The same names; a name that comes more than once gets a number: refl-1, refl-2."""
    return [name if names.count(name) == 1 else f"{name}-{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def merged(spans: Iterable[range]) -> list[range]:
    """Spans of steps in order; spans that overlap or meet become one."""
    found: list[range] = []
    for span in sorted((span for span in spans if span), key=lambda span: span.start):
        if found and span.start <= found[-1].stop:
            found[-1] = range(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return found
