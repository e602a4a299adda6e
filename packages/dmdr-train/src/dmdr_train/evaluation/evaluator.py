"""Scores of pictures: distances to real pictures, accuracy, means of rewards, diversity, and how certain they are.

Every process draws and measures its share of the batches, and the first process computes the scores. All random
numbers depend on the evaluation's seed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dmdr_models.families.protocols import Family
from dmdr_rewards.compare.metrics import Statistics, inception_score
from dmdr_rewards.score.archives import PICTURES, arrays_in
from torch import Tensor

from dmdr_train.base.errors import UserError
from dmdr_train.base.guarded_scores import asked
from dmdr_train.distributed.collectives import agreed, gather_rows, said_anywhere
from dmdr_train.evaluation.finished_batches import FinishedBatches, Rows
from dmdr_train.evaluation.measured import Measured, compare, describe, or_nan
from dmdr_train.evaluation.reference_sets import ArrayOfPictures, Pictures, make_reference
from dmdr_train.evaluation.scores import Scores
from dmdr_train.evaluation.seeded_sampling import SamplingPlan, draw_latents
from dmdr_train.recipe import schema

if TYPE_CHECKING:
    from dmdr_rewards.compare.networks import FeatureNetwork
    from dmdr_rewards.networks.classifier import Classified

Draw = Callable[[range], Tensor]
"""Draws the pictures with these indices, `[n, 3, H, W]`."""


@dataclass(frozen=True)
class Source:
    """Where pictures come from.

    Attributes:
        key: a name for files.
        own: what the pictures depend on, besides the recipe's evaluation.
        paired: whether they are pictures of the prompts, so that rewards that read prompts can score them.
        scored: whether rewards score them; a reference set is only compared with.
    """

    key: str
    draw: Draw
    own: Any = None
    paired: bool = True
    scored: bool = True


class Evaluator:
    """Scores pictures. Every process calls the methods.

    Args:
        rewards: their mean scores join the results under these names.
        network: gives the features; None takes the classifier, or pixels without one.
        finished: where the measurements of batches are kept; None keeps none, and takes no time.
        progress: called after every batch of this process.

    Attributes:
        failure: why a reward failed, which then counts as NaN; empty if none has failed.

    Raises:
        UserError: a picture of the reference cannot be read.
    """

    failure = ""

    def __init__(
        self,
        settings: schema.Evaluation,
        family: Family,
        device: torch.device,
        rewards: Mapping[str, Any] = MappingProxyType({}),
        network: "FeatureNetwork | None" = None,
        finished: FinishedBatches | None = None,
        progress: Callable[[], object] = lambda: None,
    ):
        from dmdr_rewards.networks.classifier import ImageClassifier

        self.settings, self.family, self.device = settings, family, device
        self.rewards = rewards
        self.network, self.finished, self.progress = network, finished, progress
        folder = settings.classifier
        self.classifier = None if folder is None else ImageClassifier.from_folder(folder, device)
        self.reference, self.count = make_reference(settings, family)
        size = settings.batch_size
        self.batches = batches_of(self.count, size)
        self.real_set, self.statistics = self._reference()

    def real(self) -> Scores:
        """Score other real pictures: no model can do better."""
        return self._score("real pictures", self._real("real"))

    def model(self, name: str, network: Any, plan: SamplingPlan) -> Scores:
        """Score the pictures of a network."""
        return self._score(name, Source(name, partial(self.sampled, network, plan)))

    def source(self, name: str, source: Source) -> Scores:
        """Score the pictures of a source, under a name for people."""
        return self._score(name, source)

    @torch.no_grad()
    def sampled(self, network: Any, plan: SamplingPlan, index: range) -> Tensor:
        """Draw the pictures of a network with these indices, `[n, 3, H, W]`."""
        prompts = self.reference.prompts(index)
        latents = draw_latents(self.family, network, plan, prompts, self.settings.seed, index, self.device)
        return self.family.decode(latents)

    def _reference(self) -> tuple[Measured | None, Statistics | None]:
        """The reference set, and the statistics of a file: of all pictures from which the file's are taken."""
        if not self.settings.is_npz:
            return (self._measure(self._real("reference")) if self.settings.has_pictures else None), None
        path = Path(str(self.settings.reference))
        held, statistics, made = arrays_in(path), None, None
        if "mu" in held or PICTURES not in held:
            statistics = Statistics.from_npz(path)
            refuse_other_width(path, statistics, self._width())
        if PICTURES in held:
            array = ArrayOfPictures(path, self.family.size)
            made = self._measure(self._real("reference", array), batches_of(len(array.cells), self.settings.batch_size))
        return made, statistics

    def _width(self) -> int:
        grey = torch.full((1, 3, *self.family.size), 0.5, device=self.device)
        return self._features(grey, self.classifier(grey) if self.classifier else None).shape[1]

    def _real(self, name: str, pictures: Pictures | None = None) -> Source:
        real: Any = self.reference if pictures is None else pictures

        def draw(index: range) -> Tensor:
            return real.pictures(name, index).to(self.device)

        return Source(name, draw, paired=self.reference.paired, scored=name == "real")

    @torch.no_grad()
    def _measure(self, source: Source, batches: Sequence[range] | None = None) -> Measured:
        """Measure this process's share of the batches, and gather the rows of all.

        Args:
            batches: None for those of the evaluated pictures.

        Every process draws equally often, as ZeRO-3 needs it: where the batches do not divide evenly, the last
        processes take the last batch again.
        """
        batches = self.batches if batches is None else batches
        rank, world = dist.get_rank(), dist.get_world_size()
        rounds, size = -(-len(batches) // world), len(batches[0])
        rows: dict[str, list[Tensor]] = {}
        unread = ""
        for number in range(rank, rounds * world, world):
            index = batches[min(number, len(batches) - 1)]
            try:
                found = self._batch(source, index, own=number < len(batches))
            except UnreadableError as error:
                unread = str(error)
                break
            for name, values in sorted(found.items()):
                padding = (0, 0) * (values.ndim - 1) + (0, size - len(values))
                rows.setdefault(name, []).append(F.pad(values.float().to(self.device), padding))
        if problem := said_anywhere(unread):
            raise UserError("tracking.evaluation.reference", problem)
        whole = {}
        for name, parts in rows.items():
            # Batch b was measured by process b mod world, in its round b div world.
            gathered = gather_rows(torch.cat(parts)).unflatten(0, (world, rounds, size)).transpose(0, 1)
            whole[name] = gathered.flatten(0, 2)[: batches[-1].stop].cpu()
        return Measured(whole)

    def _batch(self, source: Source, index: range, own: bool) -> Rows:
        """The measurements of a batch, from the disk if they are there.

        Args:
            own: whether no other process measures this batch, too.
        """
        place = self.finished and self.finished.place(source.key, source.own)
        rows = self.finished.read(place, index) if self.finished and place else None
        if rows is None:
            started = self._clock()
            images = self._drawn(source, index)
            seconds = self._clock() - started
            rows = self._measured(images, index, source)
            if self.finished and place:
                rows["seconds"] = torch.full((len(index),), seconds / len(index))
                if own:
                    self.finished.write(place, index, rows)
        self.progress()
        return rows

    def _clock(self) -> float:
        if self.finished and self.device.type == "cuda":  # without it, no time is kept
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _drawn(self, source: Source, index: range) -> Tensor:
        try:
            return source.draw(index)
        except ValueError as error:
            if source.key in ("reference", "real"):
                raise UnreadableError(str(error)) from error
            raise

    def _measured(self, images: Tensor, index: range, source: Source) -> Rows:
        """Measure pictures: one row each, of NaN for a picture that is not finite."""
        finite = images.flatten(1).isfinite().all(dim=1)
        images = torch.where(finite[:, None, None, None], images, 0.5)  # grey passes through every network
        seen = self.classifier(images) if self.classifier else None
        rows = {"pixels": F.adaptive_avg_pool2d(images.float(), 8).flatten(1)}
        if seen is not None:
            rows["logits"] = seen.logits.float()
        rows["features"] = self._features(images, seen)
        if source.scored:
            judged = self._judged(images, index, source.paired, None if seen is None else seen.logits)
            rows |= {f"judged/{name}": values for name, values in judged.items()}
        for name, values in rows.items():
            broken = ~finite.to(values.device).reshape(-1, *[1] * (values.ndim - 1))
            rows[name] = values.masked_fill(broken, torch.nan)
        return {**rows, "finite": finite.float()}

    def _features(self, images: Tensor, seen: "Classified | None") -> Tensor:
        if self.network is not None:
            return self.network.of_pictures(images)
        return F.adaptive_avg_pool2d(images.float(), 8).flatten(1) if seen is None else seen.features.float()

    def _judged(self, images: Tensor, index: range, paired: bool, logits: Tensor | None) -> dict[str, Tensor]:
        prompts = self.reference.prompts(index)
        judged = self.reference.judge(images, prompts, logits) if paired else {}
        for name, reward in self.rewards.items():
            if not paired and reward.info.prompt != "none":
                continue
            judged[name], failure = asked(partial(reward.score, images, prompts), images)
            if failure:
                self.failure = f"{name} of the evaluation: {failure}"
        return judged

    def _score(self, name: str, source: Source) -> Scores:
        made = self._measure(source)
        return agreed(lambda: self._scores(name, source, made))

    def _scores(self, name: str, source: Source, made: Measured) -> Scores:
        """The scores of pictures, on the first process alone: n² distances are not needed on every one."""
        sets = self.reference.sets(range(self.count)) if source.paired else {}
        group = self.reference.group if source.paired else 1
        values = describe(made, sets, group, self.settings.seed)
        values |= compare(self.real_set, self.statistics, made, self.device)
        if (logits := self._logits(made)) is not None:
            values["inception"] = or_nan(lambda: inception_score(logits))
        return Scores(name, **values)

    def _logits(self, made: Measured) -> Tensor | None:
        """The class logits of the features' network; or, of pictures of classes, those of the classifier."""
        if self.network is not None and self.network.head is not None:
            return self.network.logits(made["features"])
        return made["logits"] if self.family.num_classes is not None and "logits" in made.rows else None


def batches_of(count: int, size: int) -> list[range]:
    """The numbers from 0 to `count` in ranges of `size`; the last may be shorter."""
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def refuse_other_width(path: Path, statistics: Statistics, width: int) -> None:
    """Refuse statistics of another network's features.

    Raises:
        UserError: the widths differ.
    """
    known = len(statistics.mean)
    if known != width:
        message = f"{path} has features of width {known} and the network of width {width}; use the same"
        raise UserError("tracking.evaluation.reference", message)


class UnreadableError(ValueError):
    """A picture of the reference cannot be read."""
