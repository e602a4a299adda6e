"""Early warning, the measuring: the student's pictures beside the teacher's of the same prompts and noise.

What `rules` judges, and where it comes from:

    diversity, saturation, contrast     of the pictures
    trained/NAME, held_out/NAME         mean scores of the pictures, by objective and by held-out reward
    teacher/…                           all of these, of the teacher's pictures
    drift/mean, drift/std               of the latents, against the teacher's
    fake_score_ratio, grad_norm/…, past_margin/…    of the training since the last evaluation, see `rules.completed`
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dmdr_core import randn
from dmdr_models.drawing.sampling import sample
from torch import Tensor

from dmdr_train.base.errors import UNANSWERED, StoppedError, UserError
from dmdr_train.base.random_draws import Draws, named_generator
from dmdr_train.distributed.collectives import gather_rows
from dmdr_train.evaluation.sample_sheets import sample_prompts
from dmdr_train.monitoring.rules import PREFIX
from dmdr_train.objectives.guarded_scores import asked
from dmdr_train.objectives.registry import make_reward
from dmdr_train.objectives.terms import RewardTerm
from dmdr_train.recipe import schema
from dmdr_train.training.trainer import Trainer

LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Of red, green and blue, ITU-R BT.709."""


def saturation(images: Tensor) -> Tensor:
    """Mean over the pixels of max(R, G, B) − min(R, G, B), `[B, 3, H, W]` in [0, 1] to `[B]` in [0, 1]; 0 for greys."""
    return (images.amax(dim=1) - images.amin(dim=1)).flatten(1).mean(dim=1)


def contrast(images: Tensor) -> Tensor:
    """Standard deviation of the luminance over the pixels, `[B, 3, H, W]` in [0, 1] to `[B]` in [0, ½]."""
    weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device).reshape(3, 1, 1)
    return (images * weights).sum(dim=1).flatten(1).std(dim=1, correction=0)


def pooled_pixels(images: Tensor) -> Tensor:
    """Features where there is no classifier: the picture averaged to 8 x 8, `[B, 192]`."""
    return F.adaptive_avg_pool2d(images, 8).flatten(1)


def diversity(features: Tensor, group: int) -> float:
    """Mean over prompts and pairs of ‖f_i − f_j‖ / √D, of features `[prompts · group, D]`, a prompt's in a row."""
    groups = features.double().unflatten(0, (-1, group))
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    pairs = len(groups) * group * (group - 1)
    return distances.sum().item() / pairs / features.shape[1] ** 0.5


@dataclass(frozen=True)
class Look:
    """What a set of pictures is like: numbers by name; mean and spread of each latent channel, `[C]` float64."""

    values: dict[str, float]
    mean: Tensor
    std: Tensor


def drift(latents: Look, teacher: Look) -> dict[str, float]:
    """How far the latents are from the teacher's, as root mean squares over the channels; 0 where they are alike.

    `drift/mean` is of (μ − μ_T) / σ_T, `drift/std` of log(σ / σ_T), so that 0.1 is about a tenth.
    """
    spread, theirs = latents.std.clamp_min(1e-6), teacher.std.clamp_min(1e-6)
    shift, scale = (latents.mean - teacher.mean) / theirs, (spread / theirs).log()
    return {name: x.square().mean().sqrt().item() for name, x in (("drift/mean", shift), ("drift/std", scale))}


class Watch:
    """Looks at networks. Every process draws its share of the pictures, and all know all that was measured.

    A reward that fails gives NaN, and `failure` says why.

    Args:
        features: of pictures, `[B, 3, H, W]` to `[B, D]`, for the diversity.
        batch: pictures that are drawn at once.
    """

    failure = ""

    def __init__(self, settings: schema.Recipe, trainer: Trainer, features: Callable[[Tensor], Tensor], batch: int):
        self.settings = settings.watch
        self.family, self.device = trainer.family, trainer.device
        self.features = features
        samples = settings.tracking.samples.model_copy(update={"count": settings.watch.prompts})
        prompts = sample_prompts(self.family.num_classes, samples)
        self.prompts = [prompt for prompt in prompts for _ in range(settings.watch.pictures)]
        self.trained = [term for term in trainer.objectives if isinstance(term, RewardTerm)]
        self.held_out = {
            name: make_reward(f"watch.rewards.{i}", reward, settings, self.family, self.device)
            for i, (name, reward) in enumerate(zip(settings.held_out, settings.watch.rewards, strict=True))
        }
        rank, world = dist.get_rank(), dist.get_world_size()
        # Equally many on every process: where they do not come out even, the last ones draw the first again.
        share = -(-len(self.prompts) // world)
        mine = [i % len(self.prompts) for i in range(rank * share, (rank + 1) * share)]
        self.batches = [mine[i : i + batch] for i in range(0, share, batch)]

    @torch.no_grad()
    def check(self) -> None:
        """Ask the held-out rewards once, for a grey picture of every prompt: better now than at the first look.

        Raises:
            UserError: one cannot score pictures of these prompts.
            StoppedError: one does not answer.
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
    def look(self, network: Any, steps: int, method: str, guidance: float = 1.0, shift: float = 1.0) -> Look:
        """Draw the pictures and measure them; every process calls this."""
        rows: dict[str, list[Tensor]] = {}
        for index in self.batches:
            latents = self._draw(network, index, steps, method, guidance, shift)
            for name, values in self._measure(latents, index).items():
                rows.setdefault(name, []).append(values)
        whole = {n: gather_rows(torch.cat(parts).to(self.device))[: len(self.prompts)] for n, parts in rows.items()}
        mean, square = whole.pop("mean").mean(dim=0), whole.pop("square").mean(dim=0)
        seen = {"diversity": diversity(whole.pop("features"), self.settings.pictures)}
        seen |= {name: values.nanmean().item() for name, values in whole.items()}
        return Look(seen, mean, (square - mean.square()).clamp_min(0).sqrt())

    def _draw(
        self, network: Any, index: Sequence[int], steps: int, method: str, guidance: float, shift: float
    ) -> Tensor:
        noise, fresh = ([named_generator(self.settings.seed, name, i) for i in index] for name in ("noise", "rollout"))
        return sample(
            self.family,
            network,
            self.family.condition([self.prompts[i] for i in index]),
            randn((len(index), *self.family.latent_shape(*self.family.size)), noise, device=self.device),
            steps,
            method,
            guidance,
            shift,
            fresh,
        )

    def _measure(self, latents: Tensor, index: Sequence[int]) -> dict[str, Tensor]:
        """Rows of each kind, one per picture."""
        images, prompts = self.family.decode(latents), [self.prompts[i] for i in index]
        draws = Draws(self.settings.seed, ("watch", 0), index)
        scores = {f"trained/{term.name}": partial(term.score, images, prompts, draws) for term in self.trained}
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
    """The numbers of an evaluation, as they are logged."""
    found = {**student.values, **{f"teacher/{name}": value for name, value in teacher.values.items()}}
    return {f"{PREFIX}{name}": value for name, value in {**found, **drift(student, teacher)}.items()}
