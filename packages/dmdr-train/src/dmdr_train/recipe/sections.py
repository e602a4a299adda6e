"""The sections of a recipe. Every key is here, with its range and its default; those of objectives are beside them.

Conventions: a *step* is one rollout of the generator with one update, or with `rollout.updates`, and `guidance.ratio`
updates of the fake score. Batch sizes are global: over all processes and all accumulated micro-batches.
"""

from string import Formatter
from typing import Annotated, Any, Literal

from dmdr_models import registry
from dmdr_models.base.picture_size import size_text
from dmdr_models.folder.quantisation import Quantisation
from pydantic import Discriminator, Field, Tag, field_validator

from dmdr_train.recipe.fields import Fraction, Natural, Positive, Section
from dmdr_train.recipe.picture_sizes import AnyResolution, Size, sizes_of


class Lora(Section):
    rank: Positive = 32
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: list[str] | None = Field(default=None, description="names of layers; null takes the family's own list")
    init: Literal["kaiming", "gaussian", "output_gaussian"] = Field(
        default="kaiming",
        description="start values of A: peft's default, N(0, 1/rank²), or as N(0, 1) on the layer's output",
    )


class GeneratorLora(Lora):
    start: str | None = Field(
        default=None,
        description="a LoRA to continue, folder or file, of the same rank and layers; null: a new one",
    )
    per_step: bool = Field(default=False, description="one LoRA for each step of the rollout, all on one network")


class TeacherLora(Section):
    path: str = Field(description="folder or file, in PEFT's, diffusers' or kohya's layout")
    strength: float = 1.0

    @field_validator("strength")
    @classmethod
    def _has_an_effect(cls, strength: float) -> float:
        if strength == 0:
            raise ValueError("0 has no effect; leave the LoRA out")
        return strength


class Model(Section):
    """What is distilled, and how its roles are built."""

    family: str = Field(description="sit, sd3, sdxl, or a family that an installed package adds")
    path: str = Field(description="folder or hub name of the teacher")
    vae: str | None = Field(default=None, description="folder or hub name of another VAE")
    resolution: AnyResolution | None = Field(
        default=None,
        description="of the pictures in pixels: a side, height and width, or a list of sizes; null: the model's",
    )
    max_tokens: Positive | None = Field(
        default=None,
        description="length of the longest sequence of a text, such as SD3's T5; null: the family's (128 for SD3)",
    )
    generator: str | None = Field(
        None, description="folder, or file of the state dict, that the generator starts from; null: the teacher"
    )
    generator_lora: GeneratorLora | None = Field(default=None, description="train a LoRA; null: train all weights")
    fake_score_lora: Lora = Lora()
    teacher_loras: list[TeacherLora] = Field(
        default=[], description="added to the teacher's weights, and to those that the generator starts from"
    )

    @field_validator("family")
    @classmethod
    def _family_is_known(cls, family: str) -> str:
        registry.find(family)
        return family

    @field_validator("resolution")
    @classmethod
    def _sizes_differ(cls, resolution: AnyResolution | None) -> AnyResolution | None:
        sizes = [size.shape for size in sizes_of(resolution)]
        if twice := next((size for size in sizes if sizes.count(size) > 1), None):
            raise ValueError(f"{size_text(twice)} (height x width) comes twice; leave one out, and add up the shares")
        return resolution

    @property
    def sizes(self) -> list[Size]:
        """The sizes that training draws from, with shares whose sum is 1; empty: the model's own size alone.

        All else has the first size: samples, evaluation, early warning, pairs, and what is said about the student.
        """
        return sizes_of(self.resolution)


class Data(Section):
    """What the model is conditioned on: class labels, or prompts."""

    classes: Literal["all"] | list[int] = "all"
    prompts: str | None = Field(
        default=None,
        description="a text file with a prompt per line, .jsonl, .csv, .tsv, .parquet, a dataset's folder or hub name",
    )
    name: str | None = Field(default=None, description="configuration of a dataset that has several")
    column: str | None = Field(default=None, description="column of the prompts; null: prompt, caption or text")
    split: str = Field(default="train", description="of a dataset that has several")
    streaming: bool = Field(default=False, description="read the prompts as they come, without a copy on disk")
    embeddings: str | None = Field(
        default=None, description="folder that dmdr-train encode wrote; null: the text encoders run in each step"
    )
    pairs: str | None = Field(default=None, description="folder that dmdr-train pairs wrote, for regression")
    pictures: str | None = Field(
        default=None, description="folder that dmdr-train pictures wrote, the real samples of guidance.discriminator"
    )


class Rollout(Section):
    """The generator's own few-step simulation."""

    steps: Positive = 1
    mode: Literal["sde", "ode", "cps"] = Field(
        default="sde",
        description="the next state: x0 with fresh noise; by the deterministic step; or with partly fresh noise",
    )
    eta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="for mode cps: the fresh share of the noise is sin(eta · π/2); null: 0.7"
    )
    shift: Annotated[float, Field(gt=0)] = 1.0
    states: Literal["visited", "authors"] = Field(
        default="visited",
        description="where it is trained: at states that sampling visits, or as the public trainers do",
    )
    positions: Literal["independent", "stratified"] = Field(
        default="independent",
        description="the steps that samples are trained at: drawn for each sample alone, or arranged over the batch so "
        "that all processes have equal work; uniform in both cases",
    )
    reuse: Literal["none", "sample", "states"] = Field(
        default="none",
        description="what the fake score learns from: new samples for every update; the samples of the generator's own "
        "update, with new noise; or all states of these samples' rollouts in turn",
    )
    through: bool = Field(
        default=False,
        description="gradients also flow through the steps before the one that a sample is trained at",
    )
    group_size: Positive = Field(
        default=1, description="samples of each prompt, for an objective that compares the samples of a prompt"
    )
    group_noise: Literal["own", "steps", "all"] = Field(
        default="own",
        description="while an objective compares the ends of rollouts within groups: all noise is each sample's own; "
        "or the samples of a group share the noise of the steps that they are not trained at; or the first noise, too",
    )
    updates: Positive = Field(
        default=1,
        description="of the generator on the samples of each rollout, while an objective such as grpo is at work",
    )

    @property
    def fresh_noise(self) -> float:
        """η of the steps that draw noise; see `dmdr_core.gaussian_step`."""
        return (self.eta or 0.7) if self.mode == "cps" else 1.0


class Reward(Section):
    name: str
    checkpoint: str | None = Field(default=None, description="its weights; null where the reward has none")
    precision: Literal["fp32", "bf16"] = "fp32"
    options: dict[str, Any] = Field(default={}, description="of the reward")

    def same_as(self, other: "Reward") -> bool:
        """Whether both are one model: of the same weights, or, where there are none, of the same name and options."""
        if self.checkpoint is not None:
            return self.checkpoint == other.checkpoint
        return other.checkpoint is None and (self.name, self.options) == (other.name, other.options)


class ObjectiveSection(Section):
    """A term of the generator's loss, from step `start` on and before step `stop`.

    Every kind of objective has a section of its own, which inherits from this one and stands beside the objective's
    class; see `dmdr_train.recipe.objective_kinds`.
    """

    kind: str
    weight: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    start: Natural = 0
    stop: Positive | None = Field(default=None, description="null: to the end")
    ramp: Natural = Field(default=0, description="steps over which the weight rises to its value")

    def span(self, steps: int) -> range:
        """The steps of a run of `steps` in which the objective takes part."""
        return range(self.start, steps if self.stop is None else min(self.stop, steps))

    def active(self, step: int) -> bool:
        """Whether the objective takes part in a step."""
        return self.start <= step and (self.stop is None or step < self.stop)

    @property
    def also_needs(self) -> frozenset[str]:
        """What the objective needs with these settings, besides the `needs` of its class."""
        return frozenset()

    @property
    def files(self) -> dict[str, str]:
        """The files that the objective reads, except a reward's, by their keys in the section."""
        return {}

    @property
    def smallest_picture(self) -> int:
        """The side in pixels that the pictures of pairs must have for the objective to compare them."""
        return 1

    def teacher_predictions(self, guided: bool) -> int:
        """Predictions of the teacher for a sample, of an objective that matches distributions.

        Those with and without the prompt count as two.

        Args:
            guided: the teacher has classifier-free guidance (`guidance.cfg`).
        """
        return 2 if guided else 1

    def check(self, recipe: Any, key: str) -> None:
        """Check the section against the rest of the recipe.

        Args:
            recipe: the whole `dmdr_train.recipe.schema.Recipe`.
            key: the section's place, such as `objectives.1`.

        Raises:
            ValueError: "KEY: what is wrong; how to mend it".
        """


class RewardSection(ObjectiveSection):
    """The section of an objective that scores the decoded picture.

    With `weight: auto`, the objective's gradient at x0 has `ratio` times the norm of distribution matching's.
    """

    ratio: Annotated[float, Field(gt=0)] | None = Field(default=None, description="for weight: auto; null: 1")
    reward: Reward
    margin: float = 0.7

    def check(self, recipe: Any, key: str) -> None:
        check_ratio(self, key)


def check_ratio(section: Any, key: str) -> None:
    """Check that the `ratio` of a section has an effect. Raises ValueError if it has none."""
    if section.ratio is not None and section.weight != "auto":
        raise ValueError(f"{key}.ratio: {section.ratio} has no effect beside a given weight; set weight: auto")


def check_template(template: str, *fields: str) -> str:
    """Check the template of a text that a reward reads: it holds these fields in braces, and no other braces.

    Raises:
        ValueError: it does not.
    """
    try:
        found = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError:
        found = set()
    if found != set(fields):
        needed = " and ".join(f"{{{field}}}" for field in sorted(fields))
        raise ValueError(f"{template!r} must hold {needed}, and no other braces")
    return template


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
        default=None,
        description="decay of the averaged generator that is sampled and exported; it ramps up, see `Average`",
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool = Field(
        default=False, description="on a GPU, products of fp32 matrices in TF32: faster, with 10 bits instead of 23"
    )
    zero_stage: Literal[0, 1, 2, 3] = 0


Part = Literal["network", "network/2", "network/4", "vae", "rewards"]
Checkpointing = Annotated[
    Annotated[Literal["auto"], Tag("choice")] | Annotated[list[Part], Tag("parts")],
    Discriminator(lambda given: "choice" if isinstance(given, str) else "parts"),
]


class Memory(Section):
    """What costs time and saves memory.

    None of it changes results, except `quantize`, and what pictures rewards and LPIPS see. `compile`, `channels_last`
    and `offloaded_adam` change rounding.
    """

    shared_backbone: bool | None = Field(
        default=None,
        description="generator and fake score as two adapters on one network; null: wherever that can be",
    )
    quantize: Quantisation | None = Field(
        default=None,
        description="format of the frozen network's linear layers, under the adapters (QLoRA); null: as precision says",
    )
    compile: bool = Field(
        default=False, description="compile the network's blocks with torch.compile; needs a C++ compiler"
    )
    channels_last: bool = Field(
        default=False, description="frozen convolutions, of SDXL's UNet and of VAEs, store their channels last"
    )
    gradient_checkpointing: Checkpointing = Field(
        default=[],
        description="what backward passes compute again, network/2 being every second block of the network; auto: as "
        "little as the GPU's memory allows",
    )
    vae_slicing: bool = Field(default=False, description="decode one picture at a time")
    vae_tiling: bool = Field(default=False, description="decode in tiles, which blend at their seams")
    offload_text_encoders: bool = Field(default=False, description="they stay on the CPU")
    offload_optimizer: bool = Field(default=False, description="its state stays on the CPU; needs ZeRO 1, 2 or 3")
    offloaded_adam: Literal["torch", "deepspeed"] = Field(
        default="torch", description="whose AdamW updates it; deepspeed's is faster, and is compiled at its first use"
    )
    reward_crop: Positive | None = Field(
        default=None, description="side in pixels of the square that rewards and LPIPS see, cut at a random place"
    )
    reward_scale: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="rewards and LPIPS see a picture decoded at this share of the resolution"
    )

    @field_validator("gradient_checkpointing")
    @classmethod
    def _one_share_of_blocks(cls, parts: Checkpointing) -> Checkpointing:
        shares = [part for part in parts if part.startswith("network")]
        if parts != "auto" and len(shares) > 1:
            raise ValueError(f"{' and '.join(shares)} contradict each other; keep one of them")
        return parts

    @property
    def checkpointed_blocks(self) -> int:
        """n, if every n-th block of the network is checkpointed; 0 if none is."""
        for part in self.gradient_checkpointing:
            name, _, every = part.partition("/")
            if name == "network":
                return int(every or 1)
        return 0


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
    init_moments: bool = Field(
        default=False, description="with init_from, also take the moments that its optimizers have"
    )
    max_skipped: Positive = Field(
        default=20, description="steps in a row without finite losses and gradients after which the run stops"
    )
    timeout: Annotated[float, Field(gt=0, le=1e9)] = Field(
        default=1800.0, description="seconds after which processes give up waiting for one that died or hangs"
    )
