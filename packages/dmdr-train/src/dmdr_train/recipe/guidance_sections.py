"""The section `guidance` of a recipe: teacher, fake score, and discriminator."""

from typing import Annotated, Literal

from pydantic import Field

from dmdr_train.recipe.fields import Fraction, Positive, Section


class Renoise(Section):
    """The share of the way to noise is Beta(alpha, beta) distributed; in a dynamic phase, at step 0."""

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


class Alignment(Section):
    """After an update of the generator, the fake score moves toward it: φ ← decay · φ + (1 − decay) · θ."""

    decay: Fraction = Field(default=0.98, description="the share of the fake score that stays")


class DiscriminatorHead(Section):
    """A head on the guidance network's features, trained to tell real samples from the generator's."""

    features: Literal["teacher", "fake_score"] = Field(
        default="teacher", description="the role of the guidance network whose middle block the head sees"
    )
    teacher_steps: Positive | None = Field(
        default=8,
        description="steps in which the teacher draws the real samples; null: they are those of data.pictures, or else "
        "of data.pairs",
    )
    renoise: Renoise | None = Field(
        default=None, description="noise levels at which the head sees samples, at all steps; null: those of the step"
    )
    loss: Literal["logistic", "hinge"] = "logistic"
    r1: Annotated[float, Field(ge=0)] = Field(default=0.1, description="weight of the gradient penalty; 0: none")
    width: Positive = Field(default=64, description="of the head's layers")
    lr: Annotated[float, Field(gt=0)] = 1e-3


class Guidance(Section):
    """Teacher and fake score."""

    ratio: Positive = Field(default=5, description="fake-score updates per generator update")
    fake_scale: Annotated[float, Field(gt=0)] = Field(default=2.0, description="LoRA scale of the fake score, s_f")
    cfg: Annotated[float, Field(ge=1)] = Field(default=1.0, description="the teacher's guidance scale w; 1 is none")
    cfg_jitter: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="w is uniform in [w - jitter, w + jitter]"
    )
    teacher_cfg: Annotated[float, Field(ge=1)] | None = Field(
        default=None,
        description="the scale with which the teacher draws pictures: pairs, the discriminator's real samples, and "
        "what the student is compared with; null: cfg",
    )
    unconditional: Literal["model", "empty_text"] = Field(
        default="model", description="the prediction without a prompt: as the model says, or of the empty text"
    )
    renoise_from: Literal["x0", "next_state"] = Field(
        default="x0",
        description="where noise is added for the two scores: to the sample's x0, or to the state that its rollout "
        "goes to next (sub-interval matching)",
    )
    consistency: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="weight of the fake score's self-consistency, for renoise_from: next_state; null: 0.01 there",
    )
    dynamics: Dynamics | None = Field(
        default=None, description="null: the bare teacher and uniform renoising from the start"
    )
    alignment: Alignment | None = Field(
        default=None,
        description="after each update of the generator; null: the fake score learns from samples alone",
    )
    discriminator: DiscriminatorHead | None = Field(
        default=None, description="for adversarial objectives and density ratios; null: none"
    )

    @property
    def drawing_cfg(self) -> float:
        """The guidance scale with which the teacher draws pictures."""
        return self.cfg if self.teacher_cfg is None else self.teacher_cfg

    @property
    def self_consistency(self) -> float:
        """The weight of the self-consistency in force."""
        if self.renoise_from == "x0":
            return 0.0
        return 0.01 if self.consistency is None else self.consistency
