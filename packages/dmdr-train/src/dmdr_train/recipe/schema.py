"""The recipe: ten sections that fully define a run. Every key is here, with its range and its default.

Conventions: a *step* is one update of the generator, which goes with `guidance.ratio` updates of the fake score. Batch
sizes are global: over all processes and all accumulated micro-batches.
"""

import difflib
from string import Formatter
from typing import Annotated, Any, Literal

from dmdr_rewards.base.secrets import ADVICE, secret_in
from pydantic import BaseModel, ConfigDict, Field, model_validator

EVALUATED = ("frechet", "frechet_pixels", "precision", "recall", "accuracy")
"""The numbers of an evaluation; of the first two, lower is better."""

DRAWN = ("shapes", "scenes")
"""References of an evaluation that are drawn, and lie in no folder."""

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _fields(template: str) -> set[str | None] | None:
    """The names in braces of a format string; None for one that is no such string."""
    try:
        return {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError:
        return None


def _numbered(names: list[str]) -> list[str]:
    """The same names, those that come more than once with their number: refl-1, refl-2."""
    return [name if names.count(name) == 1 else f"{name}-{names[: i + 1].count(name)}" for i, name in enumerate(names)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Lora(Section):
    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: list[str] | None = Field(default=None, description="names of layers; null takes the family's own list")


class Model(Section):
    """What is distilled, and how its roles are built."""

    family: Literal["sit", "sd3", "sdxl"]
    path: str = Field(description="folder or hub name of the teacher")
    vae: str | None = Field(default=None, description="folder or hub name of another VAE")
    resolution: Positive | None = Field(default=None, description="side of the pictures in pixels; null: the model's")
    max_tokens: Positive | None = Field(default=None, description="of the T5 text encoder of SD3; null: 128")
    generator: str | None = Field(
        None, description="folder, or file of the state dict, that the generator starts from; null: the teacher"
    )
    generator_lora: Lora | None = Field(default=None, description="train a LoRA; null: train all weights")
    fake_score_lora: Lora = Lora()


class Data(Section):
    """What the model is conditioned on: class labels, or prompts."""

    classes: Literal["all"] | list[int] = "all"
    prompts: str | None = Field(
        default=None,
        description="a text file with a prompt per line, .jsonl, .csv, .parquet, a dataset's folder or its hub name",
    )
    column: str | None = Field(default=None, description="column of the prompts; null: prompt, caption or text")
    split: str = Field(default="train", description="of a dataset that has several")
    streaming: bool = Field(default=False, description="read the prompts as they come, without a copy on disk")
    embeddings: str | None = Field(
        default=None, description="folder that dmdr-train encode wrote; null: the text encoders run along"
    )
    pairs: str | None = Field(default=None, description="folder that dmdr-train pairs wrote, for regression")


class Rollout(Section):
    """The generator's own few-step simulation."""

    steps: Positive = 1
    mode: Literal["sde", "ode"] = "sde"
    shift: Annotated[float, Field(gt=0)] = 1.0
    states: Literal["visited", "authors"] = Field(
        default="visited",
        description="where it is trained: at states that sampling visits, or as the public trainers do",
    )


class Reward(Section):
    name: str
    checkpoint: str | None = Field(default=None, description="its weights; null where the reward has none")
    precision: Literal["fp32", "bf16"] = "fp32"
    options: dict[str, Any] = {}

    def same_as(self, other: "Reward") -> bool:
        """Whether both are one model: of the same weights, or, where there are none, of the same name and options."""
        if self.checkpoint is not None:
            return self.checkpoint == other.checkpoint
        return other.checkpoint is None and (self.name, self.options) == (other.name, other.options)


class Objective(Section):
    """A term of the generator's loss, from step `start` on and before step `stop`."""

    weight: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    start: Natural = 0
    stop: Positive | None = Field(default=None, description="null: to the end")
    ramp: Natural = Field(default=0, description="steps over which the weight rises to its value")

    def span(self, steps: int) -> range:
        """The steps of a run of `steps` in which it is at work."""
        return range(self.start, steps if self.stop is None else min(self.stop, steps))


class DistributionMatching(Objective):
    kind: Literal["distribution_matching"]
    weight: Annotated[float, Field(gt=0)] = 1.0


class Regression(Objective):
    """To what the teacher made of the noise, over its whole trajectory; one step alone can be trained so."""

    kind: Literal["regression"]
    weight: Annotated[float, Field(gt=0)] = 1.0


class RewardObjective(Objective):
    """One that scores the decoded picture.

    With `weight: auto`, its gradient at x0 has `ratio` times the norm of distribution matching's.
    """

    ratio: Annotated[float, Field(gt=0)] | None = Field(default=None, description="for weight: auto; null: 1")
    reward: Reward
    margin: float = 0.7


class ReFL(RewardObjective):
    kind: Literal["refl"]
    template: str = Field(default="{prompt}", description="what the reward reads; HPS: Realistic photo, {prompt}")


class SRPO(RewardObjective):
    kind: Literal["srpo"]
    positive: Annotated[list[str], Field(min_length=1)] = ["Natural-lighting", "Detailed", "Realistic"]
    negative: Annotated[list[str], Field(min_length=1)] = ["Painting", "CG Render", "Oil"]
    k: Annotated[float, Field(ge=0)] = 0.1
    template: str = "{adjective}. {prompt}"


AnyObjective = Annotated[DistributionMatching | Regression | ReFL | SRPO, Field(discriminator="kind")]


class Renoise(Section):
    """Beta(alpha, beta) at step 0."""

    alpha: Annotated[float, Field(gt=0)] = 4.0
    beta: Annotated[float, Field(gt=0)] = 1.5


class Dynamics(Section):
    """The dynamic phase of early training: both strategies fade by a cosine over `steps`."""

    steps: Positive = Field(description="length K")
    teacher_scale: Annotated[float, Field(ge=0)] = Field(
        default=0.5, description="LoRA scale of the teacher at step 0, s_r0, fading to 0 (DynaDG)"
    )
    renoise: Renoise | None = Field(
        default=Renoise(), description="renoise times, fading to uniform (DynaRS); null: uniform"
    )


class Guidance(Section):
    """Teacher and fake score."""

    ratio: Positive = Field(default=5, description="fake-score updates per generator update")
    fake_scale: Annotated[float, Field(gt=0)] = Field(default=2.0, description="LoRA scale of the fake score, s_f")
    cfg: Annotated[float, Field(ge=1)] = Field(default=1.0, description="the teacher's guidance scale w; 1 is none")
    cfg_jitter: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="w is uniform in [w - jitter, w + jitter]"
    )
    dynamics: Dynamics | None = Field(
        default=None, description="null: the bare teacher and uniform renoising from the start"
    )


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0)]
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine"] = Field("constant", description="cosine: to 0 at run.steps")
    warmup: Natural = Field(default=0, description="updates of linear warm-up")


class Optim(Section):
    batch_size: Positive = Field(description="global: processes x accumulation x micro-batch")
    accumulation: Positive = 1
    generator: Optimizer
    fake_score: Optimizer
    clip: Annotated[float, Field(gt=0)] = 1.0
    eight_bit: bool = Field(default=False, description="AdamW of bitsandbytes; needs a GPU and dmdr-train[eight-bit]")
    ema: Fraction | None = Field(
        default=None, description="decay of the averaged generator that is sampled and exported"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0


class Memory(Section):
    """What costs time and saves memory; none of it changes what is computed, but for the pictures rewards see."""

    shared_backbone: bool | None = Field(
        default=None,
        description="generator and fake score as two adapters on one network; null: wherever that can be",
    )
    gradient_checkpointing: list[Literal["network", "vae", "rewards"]] = []
    vae_slicing: bool = Field(default=False, description="decode one picture at a time")
    vae_tiling: bool = Field(default=False, description="decode in tiles, which blend at their seams")
    offload_text_encoders: bool = Field(default=False, description="they stay on the CPU")
    offload_optimizer: bool = Field(default=False, description="its state stays on the CPU; needs ZeRO 1, 2 or 3")
    reward_crop: Positive | None = Field(
        default=None, description="side in pixels of the square that rewards see, cut at a random place"
    )
    reward_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="rewards see a picture decoded at this share of the resolution"
    )


class Run(Section):
    output: Annotated[str, Field(min_length=1)]
    steps: Positive
    seed: Natural = 30
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: Natural = Field(default=0, description="steps; 0: only at the end")
    keep_last: Positive = 2
    keep_every: Natural = Field(default=0, description="also keep the checkpoints of every so many steps; 0: none")
    keep_best: str | None = Field(
        default=None,
        description="also keep the best by this: frechet, frechet_pixels, precision, recall or accuracy of the "
        "evaluation; or by what watch measures: diversity, held_out/REWARD, trained/OBJECTIVE",
    )
    save_in_background: bool = Field(
        default=False, description="go on training while a checkpoint is written from a copy in the CPU's memory"
    )
    on_failed_save: Literal["continue", "stop"] = Field(
        default="continue", description="when a checkpoint cannot be written, such as on a full disk"
    )
    resume: str = Field("never", description="never, auto, or a checkpoint folder")
    init_from: str | None = Field(default=None, description="checkpoint whose networks a new run starts from")
    max_skipped: Positive = Field(
        default=20, description="steps in a row without finite losses and gradients after which the run stops"
    )
    timeout: Annotated[float, Field(gt=0, le=1e9)] = Field(
        default=1800.0, description="seconds after which processes give up waiting for one that died or hangs"
    )


class Samples(Section):
    every: Natural = Field(default=0, description="steps; 0: only before and after")
    count: Positive = Field(default=10, description="pictures in a row")
    seed: Natural = 1000
    prompts: list[str] | None = Field(default=None, description="null: the built-in list")


class Evaluation(Section):
    classifier: str = Field(description="image-classification folder, other than any reward's")
    reference: str = Field(
        description="`shapes` or `scenes` for the built-in drawings, or a folder with a sub-folder per class"
    )
    pictures: Annotated[int, Field(ge=100)] = 2000
    every: Natural = Field(default=0, description="steps; 0: at the end of each stage")
    teacher_steps: list[Positive] = [50, 4, 1]
    rewards: bool = Field(default=False, description="also the mean of every reward that is trained on")
    seed: Natural = 2000


class Tracking(Section):
    log_every: Positive = 10
    tensorboard: bool = True
    wandb: str | None = Field(default=None, description="project name; needs `pip install dmdr-train[wandb]`")
    samples: Samples = Samples()
    evaluation: Evaluation | None = None


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
            raise ValueError("watch.rules: a limit has one of above and below; give the other a rule of its own")
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


class Watch(Section):
    """Early warning: looks at the averaged student, the same prompts and noise every time, and judges what it sees."""

    every: Natural = Field(default=100, description="steps; 0: never")
    prompts: Positive = Field(
        default=8, description="how many: classes, or the first of tracking.samples.prompts or of the built-in list"
    )
    pictures: Annotated[int, Field(ge=2)] = Field(default=4, description="of each prompt")
    seed: Natural = 3000
    rewards: list[Reward] = Field(default=[], description="held out: they score, and no objective trains on them")
    rules: list[AnyRule] | None = Field(default=None, description="null: DEFAULT_RULES; []: none")


class Recipe(Section):
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

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, data: Any) -> Any:
        if key := secret_in(data):
            raise ValueError(f"{key}: {ADVICE}")
        return data

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        if self.guidance.cfg_jitter and self.guidance.cfg - self.guidance.cfg_jitter < 1:
            raise ValueError(
                f"guidance.cfg_jitter: {self.guidance.cfg_jitter} takes guidance.cfg {self.guidance.cfg} below 1; "
                f"use at most {self.guidance.cfg - 1:g}"
            )
        for i, objective in enumerate(self.objectives):
            self._check_objective(f"objectives.{i}", objective)
        self._check_objectives()
        self._check_data()
        self._check_backbone()
        self._check_keeping()
        self._check_watch()
        return self

    def _check_objective(self, key: str, objective: AnyObjective) -> None:
        if objective.start >= self.run.steps:
            raise ValueError(
                f"{key}.start: {objective.start} is never reached in run.steps {self.run.steps}; "
                f"use a smaller one, or remove the objective"
            )
        if objective.stop is not None and objective.stop <= objective.start:
            raise ValueError(f"{key}.stop: {objective.stop} is not after its start {objective.start}; use a later one")
        if isinstance(objective, RewardObjective) and objective.ratio is not None and objective.weight != "auto":
            raise ValueError(f"{key}.ratio: {objective.ratio} has no effect beside a given weight; set weight: auto")
        fields = {"refl": {"prompt"}, "srpo": {"adjective", "prompt"}}
        if isinstance(objective, (ReFL, SRPO)) and _fields(objective.template) != fields[objective.kind]:
            needed = " and ".join(f"{{{field}}}" for field in sorted(fields[objective.kind]))
            raise ValueError(f"{key}.template: {objective.template!r} must hold {needed}, and no other braces")

    def _check_objectives(self) -> None:
        kinds, steps = [o.kind for o in self.objectives], self.run.steps
        for kind in ("distribution_matching", "regression"):
            if kinds.count(kind) > 1:
                raise ValueError(f"objectives: {kinds.count(kind)} are of kind {kind}; use one")
        if not {"distribution_matching", "regression"} & set(kinds):
            raise ValueError("objectives: rewards alone are no distillation; add one of kind distribution_matching")
        covered = 0
        for span in [*sorted((o.span(steps) for o in self.objectives), key=lambda s: s.start), range(steps, steps)]:
            if span.start > covered:
                raise ValueError(
                    f"objectives: none is at work from step {covered} to {span.start}; let one start or stop there"
                )
            covered = max(covered, span.stop)
        matching = self.matching
        for i, objective in enumerate(self.objectives):
            span = objective.span(steps)
            if objective.weight == "auto" and (span.start < matching.start or span.stop > matching.stop):
                raise ValueError(
                    f"objectives.{i}.weight: auto follows distribution matching, which is not at work "
                    f"at all its steps; give a number"
                )
        if self.guidance.dynamics is not None and not matching:
            raise ValueError(
                "guidance.dynamics: has no effect without an objective of kind distribution_matching; leave it out"
            )
        if "regression" in kinds and self.rollout.steps != 1:
            raise ValueError(
                f"rollout.steps: {self.rollout.steps} does not go with regression, which trains a single step; use 1"
            )

    def _check_data(self) -> None:
        regression = any(o.kind == "regression" for o in self.objectives)
        if regression and self.data.pairs is None:
            raise ValueError("data.pairs: is null and regression needs them; give a folder that dmdr-train pairs wrote")
        if self.data.pairs is not None and not regression:
            raise ValueError(
                "data.pairs: has no effect without an objective of kind regression; add one, or leave it out"
            )
        if self.data.prompts is None:
            for key in ("column", "streaming", "embeddings"):
                if getattr(self.data, key):
                    raise ValueError(f"data.{key}: has no effect without data.prompts; give both, or leave it out")
        elif self.data.classes != "all":
            raise ValueError("data.classes: has no effect beside data.prompts; leave one of them out")

    def _check_backbone(self) -> None:
        if not self.memory.shared_backbone:
            return
        if self.model.generator_lora is None:
            raise ValueError("memory.shared_backbone: true needs model.generator_lora; set it, or use null")
        if self.optim.zero_stage == 3:
            raise ValueError("memory.shared_backbone: true does not go with optim.zero_stage 3; use 2, or null")
        if self.model.generator is not None:
            raise ValueError("memory.shared_backbone: true does not go with a model.generator of its own; use null")

    def _check_keeping(self) -> None:
        run, evaluation = self.run, self.tracking.evaluation
        if run.keep_every and (not run.checkpoint_every or run.keep_every % run.checkpoint_every):
            raise ValueError(
                f"run.keep_every: {run.keep_every} must be a multiple of run.checkpoint_every {run.checkpoint_every}; "
                f"change one of them"
            )
        if run.keep_best is None:
            return
        watched = [n for n in self.watched if n.startswith(("diversity", "held_out/", "trained/"))]
        if run.keep_best in EVALUATED:
            key, every = "tracking.evaluation.every", evaluation.every if evaluation else 0
        elif run.keep_best in watched:
            key, every = "watch.every", self.watch.every
        else:
            near = difflib.get_close_matches(run.keep_best, [*EVALUATED, *watched], n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join([*EVALUATED, *watched])}"
            raise ValueError(f"run.keep_best: {run.keep_best!r} is not measured here; {hint}")
        if not every or not run.checkpoint_every or every % run.checkpoint_every:
            raise ValueError(
                f"run.keep_best: {run.keep_best} needs {key} to be a multiple of run.checkpoint_every; "
                f"set both, or use null"
            )

    def _check_watch(self) -> None:
        watch, trained = self.watch, [o.reward for o in self.objectives if isinstance(o, RewardObjective)]
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
            if lacking := self._lacking(rule):
                raise ValueError(f"watch.rules.{i}{lacking}")

    def _lacking(self, rule: AnyRule) -> str:
        """Why a rule can never warn in this run, as key and message; empty if it can."""
        if rule.start is None and self.first_reward is None:
            return ".start: is null and no reward ever joins; give a step"
        if isinstance(rule, RewardHacking):
            kinds = {name.partition("/")[0] for name in self.watched}
            return "" if {"trained", "held_out"} <= kinds else ": needs a reward to hold out; give one in watch.rewards"
        teacher = f"teacher/{rule.metric}"
        if rule.metric not in self.watched:
            near = difflib.get_close_matches(rule.metric, self.watched, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(self.watched)}"
            return f".metric: {rule.metric!r} is not measured here; {hint}"
        if rule.relative_to == "teacher" and teacher not in self.watched:
            return f".relative_to: {rule.metric} is not measured of the teacher; use first, or null"
        if rule.relative_to is not None and rule.metric.startswith(("trained/", "held_out/")):
            return f".relative_to: {rule.relative_to} says nothing of a reward, whose zero is arbitrary; use null"
        return ""

    @property
    def rules(self) -> list[AnyRule]:
        """The rules in force: those given, or of the default ones those that can be judged; with their start."""
        given = DEFAULT_RULES if self.watch.rules is None else self.watch.rules
        return [
            rule if rule.start is not None else rule.model_copy(update={"start": self.first_reward})
            for rule in given
            if not self._lacking(rule)
        ]

    @property
    def first_reward(self) -> int | None:
        """The step at which the first reward joins."""
        return min((o.start for o in self.objectives if isinstance(o, RewardObjective)), default=None)

    @property
    def names(self) -> list[str]:
        """What logs call the objectives: by their kind, numbered where there are several of one."""
        return _numbered([o.kind for o in self.objectives])

    @property
    def held_out(self) -> list[str]:
        """What logs call the held-out rewards."""
        return _numbered([reward.name for reward in self.watch.rewards])

    @property
    def watched(self) -> list[str]:
        """What an evaluation of `watch` measures, as rules call it; see `dmdr_train.monitoring.measures`."""
        trained = [name for name, o in zip(self.names, self.objectives, strict=True) if isinstance(o, RewardObjective)]
        seen = ["diversity", "saturation", "contrast"]
        seen += [f"trained/{name}" for name in trained] + [f"held_out/{name}" for name in self.held_out]
        return [
            *seen,
            *(f"teacher/{name}" for name in seen),
            "drift/mean",
            "drift/std",
            "fake_score_ratio",
            *(f"grad_norm/{name}" for name in ("generator", "fake_score", *self.names)),
            *(f"past_margin/{name}" for name in trained),
        ]

    @property
    def shares_backbone(self) -> bool:
        """Whether generator and fake score are two adapters on one network."""
        if self.memory.shared_backbone is not None:
            return self.memory.shared_backbone
        return self.model.generator_lora is not None and self.optim.zero_stage < 3 and self.model.generator is None

    @property
    def matching(self) -> range:
        """The steps in which distribution matching is at work, and the fake score learns."""
        found = [o.span(self.run.steps) for o in self.objectives if o.kind == "distribution_matching"]
        return found[0] if found else range(0)

    @property
    def stages(self) -> dict[str, int]:
        """The step at which each stage ends, by its name, in order.

        A stage has the name of what joins at its start: regression, or cold start, which is distribution matching
        alone. Where rewards join in at one step only, what follows is the joint stage; where they do at several, each
        stage has the name of the rewards that joined.
        """
        kinds: dict[int, list[str]] = {}
        for objective in sorted(self.objectives, key=lambda o: o.start):
            kinds.setdefault(objective.start, []).append(objective.kind)
        rewards = {start: [k for k in joined if k in ("refl", "srpo")] for start, joined in kinds.items()}
        names: dict[int, str] = {}
        for start, joined in kinds.items():
            if not rewards[start]:
                name = "_".join(sorted(joined, reverse=True)).replace("distribution_matching", "cold_start")
            elif sum(map(bool, rewards.values())) == 1:
                name = "joint"
            else:
                name = "_".join(dict.fromkeys(rewards[start]))
            names[start] = f"{name}_{start}" if name in names.values() else name
        ends = [*list(names)[1:], self.run.steps]
        return dict(zip(names.values(), ends, strict=True))
