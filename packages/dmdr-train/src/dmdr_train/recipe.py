"""The recipe: eight sections that fully define a run. Every key is here, with its range and its default.

Conventions: a *step* is one update of the generator, which goes with `guidance.ratio` updates of the fake score. Batch
sizes are global: over all processes and all accumulated micro-batches.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Lora(Section):
    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: list[str] | None = Field(default=None, description="names of layers; null takes the family's own list")


class Model(Section):
    """What is distilled, and how its roles are built."""

    family: Literal["sit"]
    path: str = Field(description="folder or hub name of the teacher")
    vae: str | None = Field(default=None, description="folder or hub name of another VAE")
    generator: str | None = Field(
        None, description="folder of the network the generator starts from; null: the teacher"
    )
    generator_lora: Lora | None = Field(default=None, description="train a LoRA; null: train all weights")
    fake_score_lora: Lora = Lora()
    gradient_checkpointing: bool = False


class Data(Section):
    """What the model is conditioned on."""

    classes: Literal["all"] | list[int] = "all"


class Rollout(Section):
    """The generator's own few-step simulation."""

    steps: Positive = 1
    mode: Literal["sde", "ode"] = "sde"
    shift: Annotated[float, Field(gt=0)] = 1.0


class Reward(Section):
    name: str
    checkpoint: str
    options: dict[str, Any] = {}


class Objective(Section):
    """A term of the generator's loss, from step `start` on."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    start: Natural = 0


class DistributionMatching(Objective):
    kind: Literal["distribution_matching"]


class ReFL(Objective):
    kind: Literal["refl"]
    reward: Reward
    margin: float = 0.7


AnyObjective = Annotated[DistributionMatching | ReFL, Field(discriminator="kind")]


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
    fake_scale: float = Field(default=2.0, description="LoRA scale of the fake score, s_f")
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
    ema: Fraction | None = Field(
        default=None, description="decay of the averaged generator that is sampled and exported"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    zero_stage: Literal[0, 1, 2, 3] = 0


class Run(Section):
    output: str
    steps: Positive
    seed: Natural = 30
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: Natural = Field(default=0, description="steps; 0: only at the end")
    keep_last: Positive = 2
    resume: str = Field("never", description="never, auto, or a checkpoint folder")
    init_from: str | None = Field(default=None, description="checkpoint whose networks a new run starts from")


class Samples(Section):
    every: Natural = Field(default=0, description="steps; 0: only before and after")
    count: Positive = Field(default=10, description="pictures in a row")
    seed: Natural = 1000


class Evaluation(Section):
    classifier: str = Field(description="image-classification folder, other than any reward's")
    reference: str = Field(description="`shapes` for the built-in drawings, or a folder with a sub-folder per class")
    pictures: Annotated[int, Field(ge=100)] = 2000
    every: Natural = Field(default=0, description="steps; 0: at the end of each stage")
    teacher_steps: list[Positive] = [50, 4, 1]
    seed: Natural = 2000


class Tracking(Section):
    log_every: Positive = 10
    tensorboard: bool = True
    wandb: str | None = Field(default=None, description="project name; needs `pip install dmdr-train[wandb]`")
    samples: Samples = Samples()
    evaluation: Evaluation | None = None


class Recipe(Section):
    model: Model
    data: Data = Data()
    rollout: Rollout = Rollout()
    objectives: Annotated[list[AnyObjective], Field(min_length=1)]
    guidance: Guidance = Guidance()
    optim: Optim
    run: Run
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        kinds = [o.kind for o in self.objectives]
        if kinds.count("distribution_matching") != 1:
            raise ValueError("objectives: exactly one of kind distribution_matching is needed")
        if self.guidance.cfg_jitter and self.guidance.cfg - self.guidance.cfg_jitter < 1:
            raise ValueError(
                f"guidance.cfg_jitter: {self.guidance.cfg_jitter} takes guidance.cfg {self.guidance.cfg} below 1; "
                f"use at most {self.guidance.cfg - 1:g}"
            )
        for i, objective in enumerate(self.objectives):
            if objective.start >= self.run.steps:
                raise ValueError(
                    f"objectives.{i}.start: {objective.start} is never reached in run.steps {self.run.steps}; "
                    f"use a smaller one, or remove the objective"
                )
        return self

    @property
    def joint_start(self) -> int | None:
        """The step at which the first reward joins in: the end of the cold start. None without rewards."""
        return min((o.start for o in self.objectives if o.kind != "distribution_matching"), default=None)
