"""What the model is conditioned on: class labels, or texts. Which ones follows from seed, update and sample alone."""

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
    """What the generator makes samples of: prompts and noise `[B, C, H, W]`; of pairs also the teacher's x0."""

    prompts: list[Any]
    noise: Tensor
    target: Tensor | None = None


class Prompts(Protocol):
    def draw(self, draws: Draws) -> list[Any]:
        """One prompt per sample of the micro-batch."""


class ClassLabels:
    """Labels drawn uniformly from `classes`."""

    def __init__(self, classes: list[int]):
        self.classes = classes

    def draw(self, draws: Draws) -> list[int]:
        chosen = [torch.randint(len(self.classes), (), generator=g).item() for g in draws.each("prompt")]
        return [self.classes[int(i)] for i in chosen]


class TextPrompts:
    """Texts in an order shuffled by the seed, each once in an epoch; fake score and generator have an order each.

    Args:
        texts: a `datasets.Dataset` with the column `prompt`.
        batch_size: of the global batch.
    """

    def __init__(self, texts: Any, batch_size: int):
        self.texts = texts
        self.batch_size = batch_size

    def draw(self, draws: Draws) -> list[str]:
        rows = rows_in_turn(draws, self.batch_size, len(self.texts))
        return [text.strip() for text in self.texts[rows]["prompt"]]


class StreamedPrompts:
    """The same from a `datasets.IterableDataset`, shuffled by the seed within a buffer.

    A stream has no places to jump to, so every process reads all of it and keeps its share, once for the fake score and
    once for the generator; a resumed run first reads up to where it was. That is what it costs to have the same prompts
    on any number of processes and after any interruption. Prompts that fit on the disk are better read without.

    Args:
        texts: with the column `prompt`.
        batch_size: of the global batch.
        buffer: number of texts that are shuffled among each other, held in memory twice.
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
    """A shuffled IterableDataset, over and over; it only goes forward."""

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
    """Which of `size` rows the samples of a micro-batch take: each once in an epoch, in an order shuffled by the seed.

    Sample i of update number u has the place c = u · batch_size + i and the row permutation(c div size)[c mod size],
    and every kind of update an order of its own. The place is all the state there is: a run goes on exactly where it
    was, on any number of processes.
    """
    name, _ = draws.update
    epochs = [divmod(place, size) for place in places(draws, batch_size)]
    return [int(permutation(draws.seed, name, epoch, size)[place]) for epoch, place in epochs]


def places(draws: Draws, batch_size: int) -> list[int]:
    """Where the samples of a micro-batch stand in the endless sequence of an update's samples."""
    _, number = draws.update
    return [int(number) * batch_size + index for index in draws.samples]


@lru_cache(maxsize=4)  # of both updates, this epoch's and the next one's
def permutation(seed: int, update: str | int, epoch: int, size: int) -> Tensor:
    """The order of an epoch, `[size]`."""
    return torch.randperm(size, generator=named_generator(seed, "prompts", update, epoch))


def _endless(texts: Any) -> Iterator[str]:
    for epoch in itertools.count():
        texts.set_epoch(epoch)
        for row in texts:
            yield row["prompt"]


def make_prompts(settings: Recipe, family: Family) -> Prompts:
    """What samples are made for: class labels if the model takes these, otherwise the recipe's prompts."""
    if family.num_classes is None:
        return text_prompts(settings.data, settings.optim.batch_size)
    classes = settings.data.classes
    return ClassLabels(list(range(family.num_classes)) if classes == "all" else classes)
