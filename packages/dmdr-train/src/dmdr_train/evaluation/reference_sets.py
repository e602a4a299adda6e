"""What an evaluation asks for: prompts, real pictures beside them, and a check whether a picture is right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from dmdr_models.families.protocols import Family
from dmdr_rewards.score.archives import from_npz
from torch import Tensor

from dmdr_train.base.random_draws import named_generator
from dmdr_train.data.picture_folder import class_folders, fitted, pictures_in, read_picture
from dmdr_train.data.prompt_sets import Sets, read_prompt_sets
from dmdr_train.recipe import schema

HALVES = {"reference": 0, "real": 1}
"""The two draws of real pictures; they have no file in common."""


class Reference(Protocol):
    """
    Attributes:
        group: pictures of each prompt, which follow each other.
        paired: whether the real pictures are pictures of the prompts.
    """

    group: int
    paired: bool

    def prompts(self, index: range) -> list[Any]:
        """The prompts of the pictures with these indices; they are the same for every model."""

    def judge(self, images: Tensor, prompts: Sequence[Any], logits: Tensor | None) -> dict[str, Tensor]:
        """Judge pictures: one number per picture under each name, `[n]` float32, NaN where it does not apply.

        Args:
            images: `[n, 3, H, W]` in [0, 1].
            logits: of the evaluation's classifier, `[n, K]`; None without one.
        """

    def sets(self, index: range) -> dict[str, Tensor]:
        """Which of the pictures belong to each set of prompts, `[n]` bool; empty unless there are several sets."""


class Pictures(Protocol):
    """A reference with real pictures."""

    def pictures(self, name: str, index: range) -> Tensor:
        """Real pictures, `[n, 3, H, W]` in [0, 1].

        Args:
            name: `reference` or `real`, two draws without a common picture.

        Raises:
            ValueError: a picture cannot be read.
        """


class ArrayOfPictures:
    """The pictures in an .npz, in their order.

    Args:
        size: (height, width) of the pictures of the models.
    """

    def __init__(self, path: Path, size: tuple[int, int]):
        self.cells = [cell for _, cell, _ in from_npz(path)]
        self.size = size

    def pictures(self, name: str, index: range) -> Tensor:
        return torch.stack([fitted(self.cells[i].value(), self.size) for i in index])


def make_reference(settings: schema.Evaluation, family: Family) -> tuple[Reference, int]:
    """The prompts and pictures of `tracking.evaluation`, which `check_evaluation` has passed, and their number."""
    count, seed = settings.pictures, settings.seed
    if settings.reference == "scenes":
        return Scenes(seed), count
    path = settings.reference if settings.has_pictures and settings.reference != "shapes" else None
    folder = None if path is None else Path(path)
    if settings.prompt_files:
        sets, group = read_prompt_sets(settings.prompt_files), settings.per_prompt
        found = PromptSets(sets, group, count, seed, folder, family.size)
        return found, len(found.asked) * group
    assert family.num_classes is not None
    if settings.reference == "shapes":
        return Shapes(seed), count
    if folder is None:
        drawn = settings.labels == "drawn"
        return Labels(family.num_classes, drawn_labels(family.num_classes, count, seed) if drawn else None), count
    return Folder(folder, family.num_classes, seed, family.size), count


def drawn_labels(num_classes: int, count: int, seed: int) -> list[int]:
    """`count` labels, each with equal probability and independent of the others."""
    return torch.randint(num_classes, (count,), generator=named_generator(seed, "labels")).tolist()


class Labels:
    """Class labels in turn, or those that are given. A picture is right if the classifier sees its class."""

    group, paired = 1, True

    def __init__(self, num_classes: int, given: Sequence[int] | None = None):
        self.num_classes, self.given = num_classes, given

    def prompts(self, index: range) -> list[int]:
        return [i % self.num_classes if self.given is None else self.given[i] for i in index]

    def judge(self, images: Tensor, prompts: Sequence[Any], logits: Tensor | None) -> dict[str, Tensor]:
        if logits is None:
            return {}
        return {"accuracy": (logits.argmax(dim=1).cpu() == torch.tensor(prompts)).float()}

    def sets(self, index: range) -> dict[str, Tensor]:
        return {}


class Shapes(Labels):
    """The drawings of the built-in class-conditional problem."""

    def __init__(self, seed: int):
        super().__init__(10)
        self.seed = seed

    def pictures(self, name: str, index: range) -> Tensor:
        from dmdr_train.problems.shapes import drawing

        return drawing.draw(torch.tensor(self.prompts(index)), named_generator(self.seed, name, index.start))


class Folder(Labels):
    """Pictures from `folder/<class name>/*`, classes in alphabetical order; no file is taken twice."""

    def __init__(self, folder: Path, num_classes: int, seed: int, size: tuple[int, int]):
        super().__init__(num_classes)
        self.size = size
        self.classes = [pictures_in(each) for each in class_folders(folder)]
        generator = named_generator(seed, "files")
        self.orders = [torch.randperm(len(files), generator=generator).tolist() for files in self.classes]

    def pictures(self, name: str, index: range) -> Tensor:
        batch = []
        for i, label in zip(index, self.prompts(index), strict=True):
            # The two draws take alternate files, so that no picture is in both.
            place = self.orders[label][2 * (i // len(self.classes)) + HALVES[name]]
            batch.append(read_picture(self.classes[label][place], self.size))
        return torch.stack(batch)


class PromptSets:
    """Sets of held-out prompts, `group` pictures of each; and a folder of real pictures, which are of other prompts.

    If there are more prompts than `count` pictures allow, the seed chooses some of all sets.

    Args:
        count: of pictures, at most.
        size: (height, width) of the real pictures.
    """

    paired = False

    def __init__(
        self, sets: Sets, group: int, count: int, seed: int, folder: Path | None = None, size: tuple[int, int] = (0, 0)
    ):
        self.group, self.size, self.names = group, size, list(sets)
        everything = [(name, prompt) for name, prompts in sets.items() for prompt in prompts]
        chosen = torch.randperm(len(everything), generator=named_generator(seed, "prompts"))[: count // group]
        self.asked = [everything[i] for i in sorted(chosen.tolist())]
        self.files = [] if folder is None else pictures_in(folder)
        self.order = torch.randperm(len(self.files), generator=named_generator(seed, "files")).tolist()

    def prompts(self, index: range) -> list[str]:
        return [self.asked[i // self.group][1] for i in index]

    def pictures(self, name: str, index: range) -> Tensor:
        places = [self.order[2 * i + HALVES[name]] for i in index]
        return torch.stack([read_picture(self.files[place], self.size) for place in places])

    def judge(self, images: Tensor, prompts: Sequence[Any], logits: Tensor | None) -> dict[str, Tensor]:
        return {}

    def sets(self, index: range) -> dict[str, Tensor]:
        of = [self.asked[i // self.group][0] for i in index]
        several = self.names if len(self.names) > 1 else []
        return {name: torch.tensor([each == name for each in of]) for name in several if name in of}


class Scenes:
    """The drawings of the built-in text-to-image problem. Every other caption is held out: no run trains on it.

    A program checks from the pixels whether a picture is right.
    """

    group, paired = 1, True

    def __init__(self, seed: int):
        from dmdr_train.problems import scenes

        self.seed = seed
        self.captions = [
            [captions[i] for i in torch.randperm(len(captions), generator=named_generator(seed, "captions", name))]
            for name, captions in (("seen", scenes.training_captions()), ("held_out", scenes.held_out_captions()))
        ]
        self.held_out = set(self.captions[1])

    def prompts(self, index: range) -> list[str]:
        return [self.captions[i % 2][i // 2 % len(self.captions[i % 2])] for i in index]

    def pictures(self, name: str, index: range) -> Tensor:
        from dmdr_train.problems import scenes

        return scenes.draw(self.prompts(index), named_generator(self.seed, name, index.start))

    def judge(self, images: Tensor, prompts: Sequence[Any], logits: Tensor | None) -> dict[str, Tensor]:
        from dmdr_train.problems import scenes

        right = scenes.check(images.cpu(), prompts).float()
        held_out = torch.tensor([prompt in self.held_out for prompt in prompts])
        nothing = torch.full_like(right, torch.nan)
        return {
            "accuracy": torch.where(held_out, nothing, right),
            "held-out accuracy": torch.where(held_out, right, nothing),
            "brightness": scenes.brightness(images.cpu()),
        }

    def sets(self, index: range) -> dict[str, Tensor]:
        return {}
