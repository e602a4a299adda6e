"""Reference sets of an evaluation: prompts, real pictures of them, and a check whether a picture is right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from dmdr_models.families.protocols import Family
from torch import Tensor

from dmdr_train.base.random_draws import named_generator
from dmdr_train.data.picture_folder import pictures_in


class Reference(Protocol):
    def prompts(self, index: range) -> list[Any]:
        """The prompts of the pictures with these indices; they are the same for every model."""

    def pictures(self, name: str, index: range) -> Tensor:
        """Real pictures of these prompts, `[n, 3, H, W]` in [0, 1].

        Args:
            name: `reference` or `real`, two different draws.
        """

    def judge(self, images: Tensor, prompts: Sequence[Any], logits: Tensor) -> dict[str, Tensor]:
        """Judge pictures: one number per picture under each name, `[n]` float32, NaN where it does not apply.

        One of the names is `accuracy`.

        Args:
            images: `[n, 3, H, W]` in [0, 1].
            logits: of the evaluation's classifier, `[n, K]`.
        """


def make_reference(name: str, family: Family, seed: int) -> Reference:
    """The reference set that `tracking.evaluation.reference` names; `preflight` has checked it."""
    if name == "scenes":
        return Scenes(seed)
    assert family.num_classes is not None
    return Shapes(seed) if name == "shapes" else Folder(Path(name), family.num_classes, seed)


class _Classes:
    """Class labels in turn. A picture is right if the classifier sees its class."""

    num_classes: int

    def prompts(self, index: range) -> list[int]:
        return [i % self.num_classes for i in index]

    def judge(self, images: Tensor, prompts: Sequence[Any], logits: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (logits.argmax(dim=1).cpu() == torch.tensor(prompts)).float()}


class Shapes(_Classes):
    """The drawings of the built-in class-conditional problem."""

    num_classes = 10

    def __init__(self, seed: int):
        self.seed = seed

    def pictures(self, name: str, index: range) -> Tensor:
        from dmdr_train.problems.shapes import drawing

        return drawing.draw(torch.tensor(self.prompts(index)), named_generator(self.seed, name, index.start))


class Folder(_Classes):
    """Pictures from `folder/<class name>/*`, classes in alphabetical order. A class with few pictures repeats them."""

    def __init__(self, folder: Path, num_classes: int, seed: int):
        self.num_classes = num_classes
        self.classes = [pictures_in(each) for each in sorted(p for p in folder.iterdir() if p.is_dir())]
        generator = named_generator(seed, "files")
        self.orders = [torch.randperm(len(files), generator=generator).tolist() for files in self.classes]

    def pictures(self, name: str, index: range) -> Tensor:
        import numpy as np
        from dmdr_rewards.base.safe_reading import open_rgb

        half = 0 if name == "reference" else 1
        batch = []
        for i, label in zip(index, self.prompts(index), strict=True):
            # "reference" and "real" take alternate files, so that no picture is in both.
            files, position = self.classes[label], 2 * (i // len(self.classes)) + half
            array = np.asarray(open_rgb(files[self.orders[label][position % len(files)]]), dtype=np.float32) / 255
            batch.append(torch.from_numpy(array).permute(2, 0, 1))
        return torch.stack(batch)


class Scenes:
    """The drawings of the built-in text-to-image problem. Every other caption is held out: no run trains on it.

    A program checks from the pixels whether a picture is right.
    """

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

    def judge(self, images: Tensor, prompts: Sequence[Any], logits: Tensor) -> dict[str, Tensor]:
        from dmdr_train.problems import scenes

        right = scenes.check(images.cpu(), prompts).float()
        held_out = torch.tensor([prompt in self.held_out for prompt in prompts])
        nothing = torch.full_like(right, torch.nan)
        return {
            "accuracy": torch.where(held_out, nothing, right),
            "held-out accuracy": torch.where(held_out, right, nothing),
            "brightness": scenes.brightness(images.cpu()),
        }
