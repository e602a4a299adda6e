"""Early warning, first part: measures of the student's and the teacher's pictures of the same prompts and noise.

The metrics that `rules` judges:

    diversity, saturation, contrast     of the pictures
    trained/NAME, held_out/NAME         mean scores of the pictures, by the objectives and by the held-out rewards
    teacher/…                           all of the above, of the teacher's pictures
    drift/mean, drift/std               difference of the latents from the teacher's
    fake_score_ratio, grad_norm/…, past_margin/…    means since the last evaluation, see `rules.completed`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dmdr_train.base.errors import StoppedError, UserError
from dmdr_train.base.exit_codes import UNANSWERED
from dmdr_train.base.guarded_scores import asked
from dmdr_train.base.random_draws import Draws
from dmdr_train.distributed.collectives import gather_rows
from dmdr_train.evaluation.intervals import diversities
from dmdr_train.evaluation.sample_sheets import sample_prompts
from dmdr_train.evaluation.seeded_sampling import SamplingPlan, draw_latents
from dmdr_train.monitoring.rules import PREFIX
from dmdr_train.objectives.from_recipe import make_reward
from dmdr_train.recipe import schema
from dmdr_train.training.trainer import Trainer

LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue, ITU-R BT.709."""


def saturation(images: Tensor) -> Tensor:
    """Mean over the pixels of max(R, G, B) − min(R, G, B), `[B, 3, H, W]` in [0, 1] to `[B]` in [0, 1]; 0 for greys."""
    return (images.amax(dim=1) - images.amin(dim=1)).flatten(1).mean(dim=1)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the luminance over the pixels, `[B, 3, H, W]` in [0, 1] to `[B]` in [0, ½]."""
    weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device).reshape(3, 1, 1)
    return (images * weights).sum(dim=1).flatten(1).std(dim=1, correction=0)


def pooled_pixels(images: Tensor) -> Tensor:
    """Features for runs without a classifier: the picture averaged to 8 x 8, `[B, 3, H, W]` to `[B, 192]`."""
    return F.adaptive_avg_pool2d(images, 8).flatten(1)


def diversity(features: Tensor, group: int) -> float:
    """Mean over prompts and pairs of ‖f_i − f_j‖ / √D, of features `[prompts · group, D]`, sorted by prompt."""
    return diversities(features, group).mean().item()


@dataclass(frozen=True)
class Look:
    """Measures of a set of pictures: values by name; mean and deviation of each latent channel, `[C]` float64."""

    values: dict[str, float]
    mean: Tensor
    std: Tensor


def drift(latents: Look, teacher: Look) -> dict[str, float]:
    """Difference of the latents from the teacher's, as root mean squares over the channels; 0 if they are alike.

    `drift/mean` is the root mean square of (μ − μ_T) / σ_T, `drift/std` that of log(σ / σ_T): 0.1 is about 10 %.
    """
    spread, theirs = latents.std.clamp_min(1e-6), teacher.std.clamp_min(1e-6)
    shift, scale = (latents.mean - teacher.mean) / theirs, (spread / theirs).log()
    return {name: x.square().mean().sqrt().item() for name, x in (("drift/mean", shift), ("drift/std", scale))}


class Watch:
    """Draws and measures pictures of networks. Every process draws its share, and every process gets all measures.

    Args:
        features: of pictures, `[B, 3, H, W]` to `[B, D]`, for the diversity.
        batch: pictures that are drawn at once.

    Attributes:
        failure: why a reward failed, which then counts as NaN; empty if none has failed.
    """

    failure = ""

    def __init__(self, settings: schema.Recipe, trainer: Trainer, features: Callable[[Tensor], Tensor], batch: int):
        self.settings = settings.watch
        self.family, self.device = trainer.family, trainer.device
        self.features = features
        samples = settings.tracking.samples.model_copy(update={"count": settings.watch.prompts})
        prompts = sample_prompts(self.family.num_classes, samples)
        self.prompts = [prompt for prompt in prompts for _ in range(settings.watch.pictures)]
        self.trained = [objective for objective in trainer.objectives if "reward" in objective.needs]
        self.held_out = {
            name: make_reward(f"watch.rewards.{i}", reward, settings, self.family, self.device)
            for i, (name, reward) in enumerate(zip(settings.held_out, settings.watch.rewards, strict=True))
        }
        rank, world = dist.get_rank(), dist.get_world_size()
        # Every process draws equally many; if they do not divide evenly, the last processes draw the first ones again.
        share = -(-len(self.prompts) // world)
        mine = [i % len(self.prompts) for i in range(rank * share, (rank + 1) * share)]
        self.batches = [mine[i : i + batch] for i in range(0, share, batch)]

    @torch.no_grad()
    def check(self) -> None:
        """Score a grey picture of every prompt by the held-out rewards, so that a mistake shows before the training.

        Raises:
            UserError: a reward cannot score pictures of these prompts.
            StoppedError: a reward does not answer.
        """
        prompts = list(dict.fromkeys(self.prompts))
        grey = torch.full((len(prompts), 3, *self.family.size), 0.5, device=self.device)
        for i, reward in enumerate(self.held_out.values()):
            try:
                reward.score(grey, prompts)
            except ValueError as error:
                raise UserError(f"watch.rewards.{i}", str(error)) from None
            except OSError as error:
                raise StoppedError(UNANSWERED, f"watch.rewards.{i}: {error}; start again when it answers") from None

    @torch.no_grad()
    def look(self, network: Any, plan: SamplingPlan) -> Look:
        """Draw pictures of a network and measure them; every process calls this."""
        rows: dict[str, list[Tensor]] = {}
        for index in self.batches:
            prompts = [self.prompts[i] for i in index]
            latents = draw_latents(self.family, network, plan, prompts, self.settings.seed, index, self.device)
            for name, values in self._measure(latents, index).items():
                rows.setdefault(name, []).append(values)
        whole = {n: gather_rows(torch.cat(parts).to(self.device))[: len(self.prompts)] for n, parts in rows.items()}
        mean, square = whole.pop("mean").mean(dim=0), whole.pop("square").mean(dim=0)
        seen = {"diversity": diversity(whole.pop("features"), self.settings.pictures)}
        seen |= {name: values.nanmean().item() for name, values in whole.items()}
        return Look(seen, mean, (square - mean.square()).clamp_min(0).sqrt())

    def _measure(self, latents: Tensor, index: Sequence[int]) -> dict[str, Tensor]:
        """Measure a batch: for each measure one row per picture."""
        images, prompts = self.family.decode(latents), [self.prompts[i] for i in index]
        draws = Draws(self.settings.seed, ("watch", 0), index)
        scores = {f"trained/{o.name}": partial(o.score, images, prompts, draws) for o in self.trained}
        scores |= {f"held_out/{name}": partial(reward.score, images, prompts) for name, reward in self.held_out.items()}
        channels = latents.double().flatten(2)
        return {
            "mean": channels.mean(dim=2),
            "square": channels.square().mean(dim=2),
            "features": self.features(images).float(),
            "saturation": saturation(images),
            "contrast": contrast(images),
            **{name: self._scored(name, score, images) for name, score in scores.items()},
        }

    def _scored(self, name: str, score: Callable[[], Tensor], images: Tensor) -> Tensor:
        scores, failure = asked(score, images)
        if failure:
            self.failure = f"{name} of watch: {failure}"
        return scores


def compared(student: Look, teacher: Look) -> dict[str, float]:
    """The values of an evaluation, by the names under which they are logged."""
    found = {**student.values, **{f"teacher/{name}": value for name, value in teacher.values.items()}}
    return {f"{PREFIX}{name}": value for name, value in {**found, **drift(student, teacher)}.items()}
