"""SRPO in its full form: the relative reward of final pictures that are recovered by a single prediction."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from dmdr_train.base.guarded_scores import scored
from dmdr_train.objectives.srpo import SRPO
from dmdr_train.recipe.sections import ObjectiveSection, Reward, check_ratio, check_template

if TYPE_CHECKING:
    from torch import Tensor

    from dmdr_train.training.guide import Guide
    from dmdr_train.training.sample import Sample


class DirectAlignSection(ObjectiveSection):
    """With `weight: auto`, the objective's gradient at x0 has `ratio` times the norm of distribution matching's."""

    ratio: Annotated[float, Field(gt=0)] | None = Field(default=None, description="for weight: auto; null: 1")
    reward: Reward
    positive: list[str] = Field(default=["Natural-lighting", "Detailed", "Realistic"], min_length=1)
    negative: list[str] = Field(default=["Painting", "CG Render", "Oil"], min_length=1)
    template: str = "{adjective}. {prompt}"
    k: Annotated[float, Field(ge=0)] = 0.1
    k_end: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="k after k_steps of the objective, on a straight line from k; null: k stays"
    )
    k_steps: Annotated[int, Field(ge=1)] | None = Field(default=None, description="for k_end")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.25, description="of the noise at x_t that the prediction removes; the rest is known"
    )
    discount: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1, description="weight of a prediction at the end of the rollout; 1 at its start, and a line between"
    )

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        return check_template(template, "adjective", "prompt")

    def check(self, recipe: Any, key: str) -> None:
        check_ratio(self, key)
        if (self.k_end is None) != (self.k_steps is None):
            given = "k_end" if self.k_steps is None else "k_steps"
            raise ValueError(f"{key}.{given}: k changes from k to k_end over k_steps; give both, or leave both out")


class DirectAlign(SRPO):
    """−mean λ w r(prompt with an adjective, y ± share · (x0 − y)).

    y is the sample at the rollout's end, without gradient. The noise at x_t is ε = (x_t − a y) / σ, and a prediction
    that removes the share Δσ / σ of it, while the rest is known, recovers y + Δσ / σ · (x0 − y), which is y where x0 is
    y. So the reward sees a clean picture at every step of the rollout (Direct-Align).

    Every sample draws one of two branches. In the denoising branch (+) the adjective is positive and w = 1 + k. In the
    inversion branch (−) the prediction adds as much noise as it would remove, the adjective is negative and w = 1:
    there x0 moves away from what the adjective adds. Over both branches, x0 follows half the gradient of
    (1 + k) · reward(positive) − reward(negative), each at other samples. λ falls from 1 at the rollout's start to
    `discount` at its end, since late steps are hacked first.

    The paper adds known noise to y; here x_t is the state that the rollout visits, and ε follows from it. Pictures are
    decoded apart from those of other objectives. Source: SRPO, arXiv 2509.06942.
    """

    Section = DirectAlignSection  # type: ignore[assignment]
    needs = SRPO.needs | {"final_x0"}

    def __call__(self, sample: "Sample", guide: "Guide") -> "tuple[Tensor, Mapping[str, Tensor | float]]":
        import torch
        from dmdr_core.base.devices import on_device

        settings = self.settings
        inverted = torch.tensor([torch.rand((), generator=g).item() < 0.5 for g in sample.draws.each("branch")])
        k, steps = self.k(sample.step), sample.num_steps
        weights = [
            (1.0 if back else 1 + k) * (1 - (1 - settings.discount) * position / max(steps - 1, 1))
            for back, position in zip(inverted.tolist(), sample.positions, strict=True)
        ]
        signs = on_device(torch.where(inverted, -settings.share, settings.share), sample.x0.device)
        end = sample.final_x0
        recovered = end + signs.reshape(-1, *[1] * (end.ndim - 1)) * (sample.x0 - end)
        pictures = sample.decode(replace(sample, x0=recovered))
        texts = self.texts(sample, inverted.tolist())
        score, kept, failure = scored(self.reward, lambda: self.reward.score(pictures, texts), pictures)
        if failure:
            self.failure = f"{self.reward.info.name} of the objective {self.name}: {failure}"
        found = torch.where(kept, score, 0.0)
        loss = -(found * on_device(torch.tensor(weights), found.device)).mean()
        values: dict[str, Tensor | float] = {
            f"reward/{self.reward.info.name}": score.detach().nanmean(),
            f"k/{self.name}": k,
        }
        if hasattr(self.reward, "skipped"):
            values[f"unscored/{self.name}"] = 1 - kept.float().mean()
        return loss, values

    def k(self, step: int) -> float:
        """The k of a step of the training."""
        settings = self.settings
        if settings.k_end is None:
            return float(settings.k)
        return settings.k + (settings.k_end - settings.k) * min(1.0, (step - settings.start) / settings.k_steps)

    def texts(self, sample: "Sample", inverted: list[bool]) -> list[str]:
        """What the reward reads: an adjective of the branch's kind before each prompt, the same two for an update."""
        import torch

        settings, drawn = self.settings, sample.draws.shared("adjectives")
        positive, negative = (
            words[int(torch.randint(len(words), (), generator=drawn))]
            for words in (settings.positive, settings.negative)
        )
        return [
            settings.template.format(adjective=negative if back else positive, prompt=prompt)
            for back, prompt in zip(inverted, sample.prompts, strict=True)
        ]
