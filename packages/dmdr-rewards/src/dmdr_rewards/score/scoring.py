"""From pictures to scores: workers decode and resize pictures, rewards score batches, the journal stores the rows."""

import math
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmdr_rewards.base.errors import StoppedError, UserError, naming
from dmdr_rewards.interface import registry
from dmdr_rewards.interface.reward import Reward, TowerReward
from dmdr_rewards.pictures.images import Picture
from dmdr_rewards.pictures.preprocess import Preprocess
from dmdr_rewards.score.output import Key, Row, ScoreTable
from dmdr_rewards.score.reward_arguments import RewardArgument
from dmdr_rewards.score.sources import Item, open_picture

T = TypeVar("T")


def score_missing(
    arguments: Sequence[RewardArgument],
    missing: dict[Key, Item],
    table: ScoreTable,
    provenance: dict[str, str | None],
    options: Namespace,
) -> float:
    """Load the rewards and score the missing pictures into the table's journal -> pictures per second.

    options  device, dtype, batch_size, workers, strict

    Batches are taken from the missing pictures in order, so a run that is killed between two batches continues with
    the batches that it would have had. Raises UserError before the first picture; afterwards StoppedError, for lack of
    memory or, under `strict`, for a picture that cannot be scored.
    """
    rewards = _load(arguments, device_of(options.device), getattr(torch, options.dtype))
    made_by = {**provenance, **{f"{name}.preprocess": reward.info.preprocess for name, reward in rewards.items()}}
    table.refuse_unless_made_by(made_by)
    _check_labels(rewards, missing.values())

    keys, items = list(missing), list(missing.values())
    begin, done = time.perf_counter(), 0
    try:
        with progress(len(items)) as advance, torch.inference_mode():
            scorer = _Scorer(rewards, device_of(options.device))
            for batch in _one_late(scorer.batches(items, options.batch_size, options.workers)):
                part = slice(done, done + len(batch.errors))
                rows = _rows(items[part], batch, made_by)
                if options.strict:
                    _refuse_errors(rows)
                table.append(dict(zip(keys[part], rows, strict=True)))
                advance(len(rows))
                done = part.stop
    except torch.OutOfMemoryError as error:
        raise StoppedError("--batch-size", f"{options.batch_size} is too many for the memory: {error}") from error
    return len(items) / (time.perf_counter() - begin)


class Loaded(NamedTuple):
    """A batch from a worker.

    errors  for each picture, why it cannot be scored, or None
    pixels  for each preprocessing, float32 Tensor[R, 3, h, w] of the R pictures without an error
    arrays  the same R pictures before preprocessing, uint8 [H, W, 3], if a reward needs them
    """

    errors: list[str | None]
    pixels: list[Tensor]
    arrays: list[np.ndarray]


class Steps(Protocol):
    """From one picture to a network's pixels, float32 Tensor[3, h, w] of one size; `Preprocess` is the usual one."""

    def picture(self, picture: Picture) -> Tensor: ...


class Pictures(Dataset):
    """Decodes and preprocesses one picture at a time, in a worker."""

    def __init__(self, sources: Sequence[Any], preprocesses: Sequence[Steps], arrays: bool) -> None:
        self.sources, self.preprocesses, self.arrays = sources, preprocesses, arrays

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Loaded:
        try:
            picture = open_picture(self.sources[index])
            pixels = [preprocess.picture(picture) for preprocess in self.preprocesses]
        except ValueError as error:
            return Loaded([str(error)], [], [])
        return Loaded([None], pixels, [np.asarray(picture)] if self.arrays else [])


def collate(pictures: Sequence[Loaded]) -> Loaded:
    """Single pictures -> a batch."""
    good = [picture for picture in pictures if picture.errors == [None]]
    return Loaded(
        errors=[picture.errors[0] for picture in pictures],
        pixels=[torch.stack(pixels) for pixels in zip(*(picture.pixels for picture in good), strict=True)],
        arrays=[array for picture in good for array in picture.arrays],
    )


class Scored(NamedTuple):
    """A scored batch.

    errors  for each picture, why it cannot be read, or None
    scores  reward -> scores of the other pictures, in order; a reward's reason in place of a score that it refuses
    notes   reward -> what a user should know about each of these scores, or None
    """

    errors: list[str | None]
    scores: dict[str, Tensor | list[float | str]]
    notes: dict[str, list[str | None]]


class _Scorer:
    """Several rewards over batches of pictures."""

    def __init__(self, rewards: dict[str, Reward], device: torch.device) -> None:
        self.rewards, self.device = rewards, device
        self.staged: dict[str, Any] = {name: reward for name, reward in rewards.items() if _has_stages(reward)}
        self.preprocesses = list(dict.fromkeys(reward.preprocess for reward in self.staged.values()))

    def batches(self, items: Sequence[Item], batch_size: int, workers: int) -> Iterator[Scored]:
        loader = DataLoader(
            Pictures([item.source for item in items], self.preprocesses, len(self.staged) < len(self.rewards)),
            batch_size=batch_size,
            num_workers=min(workers, math.ceil(len(items) / batch_size)),
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )
        for start, batch in zip(range(0, len(items), batch_size), loader, strict=True):
            yield self._score(items[start : start + batch_size], batch)

    def _score(self, items: Sequence[Item], batch: Loaded) -> Scored:
        read = [item for item, error in zip(items, batch.errors, strict=True) if error is None]
        if not read:
            return Scored(batch.errors, {name: [] for name in self.rewards}, {})
        prompts = {name: [_prompt(reward, item) for item in read] for name, reward in self.rewards.items()}
        pixels = [tensor.to(self.device, non_blocking=True) for tensor in batch.pixels]
        staged = self._score_pixels(dict(zip(self.preprocesses, pixels, strict=True)), prompts)
        scores = {}
        for name, reward in self.rewards.items():
            with naming(f"--reward {name}", StoppedError):
                scores[name] = staged[name] if name in staged else _score_arrays(reward, batch.arrays, prompts[name])
        notes = {
            name: each.notes(prompts[name]) for name, each in self.rewards.items() if isinstance(each, TowerReward)
        }
        return Scored(batch.errors, scores, notes)

    def _score_pixels(self, pixels: dict[Preprocess, Tensor], prompts: dict[str, list[Any]]) -> dict[str, Tensor]:
        features: dict[Any, Any] = {}  # rewards with the same tower and preprocessing share them
        scores = {}
        for name, reward in self.staged.items():
            key = (id(reward.tower), reward.preprocess)
            if key not in features:
                features[key] = reward.features(pixels[reward.preprocess])
            scores[name] = reward.score_features(features[key], prompts[name])
        return scores


def _has_stages(reward: Reward) -> bool:
    """Whether workers can compute the pixels: the reward has an image tower, and its pixels have one size."""
    return isinstance(reward, TowerReward) and reward.preprocess.image_size is not None


def _score_arrays(reward: Reward, arrays: Sequence[np.ndarray], prompts: Sequence[Any]) -> list[float | str]:
    """Scores from a reward that only defines `score`; the reason for a picture that it refuses.

    Some rewards refuse a batch of several sizes. A batch that is refused is tried again size by size, then one by one.
    """
    try:
        return reward.score(list(arrays), list(prompts)).tolist()
    except ValueError as error:
        if len(arrays) == 1:
            return [str(error)]
    groups: dict[Any, list[int]] = defaultdict(list)
    several = len({array.shape for array in arrays}) > 1
    for place, array in enumerate(arrays):
        groups[array.shape if several else place].append(place)
    found: dict[int, float | str] = {}
    for places in groups.values():
        part = _score_arrays(reward, [arrays[place] for place in places], [prompts[place] for place in places])
        found.update(zip(places, part, strict=True))
    return [found[place] for place in range(len(arrays))]


def _prompt(reward: Reward, item: Item) -> Any:
    return item.label if reward.info.prompt == "class_label" else item.prompt or ""


def _rows(items: Sequence[Item], batch: Scored, made_by: dict[str, str | None]) -> list[Row]:
    """Rows of the output, without the total. A score that is not finite counts as an error."""
    columns = {
        name: iter(scores.tolist() if isinstance(scores, Tensor) else scores) for name, scores in batch.scores.items()
    }
    notes = {name: iter(column) for name, column in batch.notes.items()}
    rows = []
    for item, error in zip(items, batch.errors, strict=True):
        scores = {name: next(column) if error is None else None for name, column in columns.items()}
        reasons = [error] if error is not None else []
        for name, score in scores.items():
            if isinstance(score, str) or (score is not None and not math.isfinite(score)):
                reasons.append(f"{name}: {score}")
                scores[name] = None
        told = [(name, next(column)) for name, column in notes.items()] if error is None else []
        identity = {"file_name": item.file_name, "prompt": item.prompt, "label": item.label}
        said = {
            "error": "; ".join(reasons) or None,
            "note": "; ".join(f"{name} {note}" for name, note in told if note) or None,
        }
        rows.append({**identity, **scores, "total": None, **said, **made_by})
    return rows


def _refuse_errors(rows: Iterable[Row]) -> None:
    for row in rows:
        if row["error"]:
            raise StoppedError("--strict", f"picture {row['file_name']}: {row['error']}")


def _load(arguments: Sequence[RewardArgument], device: torch.device, dtype: torch.dtype) -> dict[str, Reward]:
    """The rewards, in order. Those without a checkpoint on disk load first: a wrong path is reported at once."""
    rewards = {}
    for each in sorted(arguments, key=lambda each: each.checkpoint is not None and Path(each.checkpoint).exists()):
        with naming(f"--reward {each.name}"):
            rewards[each.name] = registry.create(each.reward, each.checkpoint, device, dtype, **each.options)
    return {each.name: rewards[each.name] for each in arguments}


def device_of(name: str) -> torch.device:
    """The device that `--device` names. Raises UserError for one that cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError("--device", f"{name} cannot be used: {str(error).splitlines()[0]}; give cpu or auto") from error
    return device


def _check_labels(rewards: dict[str, Reward], items: Iterable[Item]) -> None:
    counts = [(count, name) for name, reward in rewards.items() if (count := reward.info.num_classes) is not None]
    if not counts:
        return
    known, name = min(counts)
    for item in items:
        if item.label is not None and not 0 <= item.label < known:
            raise UserError(
                "--prompts", f"picture {item.file_name} has label {item.label}; {name} knows 0 to {known - 1}"
            )


def _one_late(batches: Iterable[T]) -> Iterator[T]:
    """Yield each batch after the next one has started: the accelerator works on it while results are copied back."""
    held = []
    try:
        for batch in batches:
            held.append(batch)
            if len(held) == 2:
                yield held.pop(0)
    except Exception:  # keep the scores of the batch before the one that failed
        yield from held
        raise
    yield from held


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar with throughput on stderr, if that is a terminal -> a function that counts pictures."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed or 0:.3g} pictures/s")

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
