"""The sections of a recipe that say what is logged, sampled, scored and watched while it trains."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator

from dmdr_train.recipe.alarm_rules import AnyRule
from dmdr_train.recipe.fields import Natural, Positive, Section
from dmdr_train.recipe.sections import Reward

EVALUATED = ("frechet", "frechet_pixels", "precision", "recall", "accuracy")
"""The numbers of an evaluation; of the first two, lower is better."""

DRAWN = ("shapes", "scenes")
"""References of an evaluation that are drawn, and lie in no folder."""


class Samples(Section):
    every: Natural = Field(default=0, description="steps; 0: only before and after")
    count: Positive = Field(default=10, description="pictures in a row")
    seed: Natural = 1000
    prompts: list[str] | None = Field(default=None, description="null: the built-in list")


class Evaluation(Section):
    """How the pictures of teacher and student are scored; docs/evaluation.md explains the keys."""

    classifier: str | None = Field(
        default=None, description="image-classification folder, other than any reward's; null: no accuracy"
    )
    reference: str | None = Field(
        default=None,
        description="`shapes` or `scenes` for the built-in drawings; a folder of real pictures, with a sub-folder per "
        "class for a model of classes; an .npz with the mean and covariance of their features, or with pictures in "
        "ADM's layout; null: none",
    )
    features: Reward | None = Field(
        default=None,
        description="inception, dinov2, clip, class-label, or a reward with an image tower; null: the classifier",
    )
    prompt_files: list[str] = Field(default=[], description="sets of held-out prompts for a model of texts")
    per_prompt: Positive = Field(default=1, description="pictures of each held-out prompt; 2 or more give a diversity")
    pictures: Annotated[int, Field(ge=100)] = Field(default=2000, description="at most so many of prompt_files")
    labels: Literal["in_turn", "drawn"] = Field(
        default="in_turn", description="of a model of classes; drawn: each with equal probability, as ADM does"
    )
    batch_size: Positive = Field(default=125, description="pictures that a process draws at once")
    every: Natural = Field(default=0, description="steps; 0: at the end of each stage")
    teacher_steps: list[Positive] = Field(default=[50, 4, 1])
    rewards: Annotated[
        Annotated[bool, Tag("true_or_false")] | Annotated[list[Reward], Tag("list_of_rewards")],
        Discriminator(lambda value: "list_of_rewards" if isinstance(value, list) else "true_or_false"),
    ] = Field(
        default=False,
        description="rewards whose mean scores are shown, too; true takes the rewards that objectives train on",
    )
    seed: Natural = 2000

    @field_validator("prompt_files", mode="before")
    @classmethod
    def _one_is_a_list(cls, files: Any) -> Any:
        return [files] if isinstance(files, str) else files

    @property
    def has_pictures(self) -> bool:
        """Whether the reference is a set of real pictures, of which half become the row `real`."""
        return self.reference is not None and not self.is_npz

    @property
    def is_npz(self) -> bool:
        """Whether the reference is a file of statistics, of pictures, or of both."""
        return self.reference is not None and self.reference.endswith(".npz")

    @property
    def measured(self) -> list[str]:
        """Those of `EVALUATED` that this evaluation measures."""
        pictures = ("frechet_pixels", "precision", "recall") if self.has_pictures else ()
        right = self.reference == "scenes" or (self.classifier is not None and not self.prompt_files)
        has = {*pictures, *(["frechet"] if self.reference else []), *(["accuracy"] if right else [])}
        return [name for name in EVALUATED if name in has]


class Tracking(Section):
    log_every: Positive = 10
    tensorboard: bool = True
    wandb: str | None = Field(default=None, description="project name; needs `pip install dmdr-train[wandb]`")
    trackers: dict[str, dict[str, Any]] = Field(default={}, description="trackers of plug-ins by name, with options")
    samples: Samples = Samples()
    evaluation: Evaluation | None = None


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
