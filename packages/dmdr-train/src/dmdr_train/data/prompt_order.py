"""The prompts of each update: class labels or texts, which depend on seed, update and sample alone."""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from dmdr_models.families.protocols import Family
from torch import Tensor

from dmdr_train.base.random_draws import Draws, named_generator
from dmdr_train.data.prompt_files import open_prompts
from dmdr_train.recipe.schema import Data, Recipe


class Start(NamedTuple):
    """The generator's input: prompts and noise `[B, C, H, W]`; with pairs also the target, the teacher's sample."""

    prompts: list[Any]
    noise: Tensor
    target: Tensor | None = None


class Prompts(Protocol):
    def draw(self, draws: Draws) -> list[Any]:
        """Draw one prompt per sample of the micro-batch."""


class ClassLabels:
    """Labels drawn uniformly from `classes`."""

    def __init__(self, classes: list[int]):
        self.classes = classes

    def draw(self, draws: Draws) -> list[int]:
        chosen = [torch.randint(len(self.classes), (), generator=g).item() for g in draws.each("prompt")]
        return [self.classes[int(i)] for i in chosen]


class TextPrompts:
    """Texts in an order shuffled by the seed, each once in an epoch. Fake score and generator have different orders.

    Args:
        texts: a `datasets.Dataset` with the column `prompt`.
        batch_size: the number of prompts in a global batch.
    """

    def __init__(self, texts: Any, batch_size: int):
        self.texts = texts
        self.batch_size = batch_size

    def draw(self, draws: Draws) -> list[str]:
        rows = rows_in_turn(draws, self.batch_size, len(self.texts))
        return [text.strip() for text in self.texts[rows]["prompt"]]


class StreamedPrompts:
    """Texts of a `datasets.IterableDataset`, shuffled by the seed within a buffer.

    The prompts are the same on any number of processes and after any interruption. Since a stream has no random access,
    every process reads all of it and keeps its share, once for the fake score and once for the generator; a resumed run
    first reads up to its step. If the prompts fit on the disk, reading them without streaming is faster.

    Args:
        texts: with the column `prompt`.
        batch_size: the number of prompts in a global batch.
        buffer: number of texts that are shuffled at a time; memory holds two such buffers.
    """

    def __init__(self, texts: Any, batch_size: int, buffer: int = 10_000):
        self.texts = texts
        self.batch_size = batch_size
        self.buffer = buffer
        self._streams: dict[str | int, _Stream] = {}

    def draw(self, draws: Draws) -> list[str]:
        name, _ = draws.update
        wanted = places(draws, self.batch_size)
        stream = self._streams.get(name)
        if stream is None or wanted[0] < stream.place:
            seed = named_generator(draws.seed, "prompts", name).initial_seed()
            stream = self._streams[name] = _Stream(self.texts.shuffle(seed=seed, buffer_size=self.buffer))
        return [stream.text_at(place).strip() for place in wanted]


class _Stream:
    """An endless repetition of a shuffled IterableDataset, read forward."""

    def __init__(self, texts: Any):
        self.texts = _endless(texts)
        self.place = 0

    def text_at(self, place: int) -> str:
        text = next(itertools.islice(self.texts, place - self.place, None))
        self.place = place + 1
        return text


def text_prompts(data: Data, batch_size: int) -> TextPrompts | StreamedPrompts:
    """Open the prompts of a recipe.

    Raises:
        UserError: as in `dmdr_train.data.prompt_files.open_prompts`.
    """
    texts = open_prompts(data)
    return StreamedPrompts(texts, batch_size) if data.streaming else TextPrompts(texts, batch_size)


def rows_in_turn(draws: Draws, batch_size: int, size: int) -> list[int]:
    """The rows of the samples of a micro-batch, out of `size` rows: each once in an epoch, in a shuffled order.

    Sample i of update number u has the place c = u · batch_size + i and the row permutation(c div size)[c mod size].
    Every kind of update has an order of its own. No other state is needed to resume a run exactly, on any number of
    processes.
    """
    name, _ = draws.update
    epochs = [divmod(place, size) for place in places(draws, batch_size)]
    return [int(permutation(draws.seed, name, epoch, size)[place]) for epoch, place in epochs]


def places(draws: Draws, batch_size: int) -> list[int]:
    """The places of the samples of a micro-batch in the endless sequence of all samples of this kind of update."""
    _, number = draws.update
    return [int(number) * batch_size + index for index in draws.samples]


@lru_cache(maxsize=4)  # two kinds of updates, each in this epoch and the next
def permutation(seed: int, update: str | int, epoch: int, size: int) -> Tensor:
    """The order of an epoch, `[size]`."""
    return torch.randperm(size, generator=named_generator(seed, "prompts", update, epoch))


def _endless(texts: Any) -> Iterator[str]:
    for epoch in itertools.count():
        texts.set_epoch(epoch)
        for row in texts:
            yield row["prompt"]


def make_prompts(settings: Recipe, family: Family) -> Prompts:
    """The source of prompts: class labels if the model takes them, otherwise the recipe's prompts."""
    if family.num_classes is None:
        return text_prompts(settings.data, settings.optim.batch_size // settings.rollout.group_size)
    classes = settings.data.classes
    return ClassLabels(list(range(family.num_classes)) if classes == "all" else classes)
