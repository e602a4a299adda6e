"""The work of `dmdr-train pictures`: it encodes pictures by the recipe's VAE, with their prompts or class labels."""

import hashlib
import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dmdr_models.base.picture_size import as_setting
from dmdr_models.families.protocols import Family
from dmdr_rewards.base.errors import UserError as ScoreError
from dmdr_rewards.score.prompts import with_prompts
from dmdr_rewards.score.sources import Item, find, open_picture
from dmdr_rewards.score.tables import class_label
from torch import Tensor

from dmdr_train.base.errors import UserError, naming
from dmdr_train.base.random_draws import named_generator
from dmdr_train.data.picture_folder import class_folders, fitted
from dmdr_train.data.real_pictures import made_with, pictures_folder
from dmdr_train.data.shard_folder import Made, processes
from dmdr_train.distributed.device import choose_device
from dmdr_train.recipe.schema import DRAWN, Recipe
from dmdr_train.training.networks import load_family, open_decoder

FIX = "give --prompts FILE, a table with file_name and {}, or a .txt of the same name beside each picture"


class Source(NamedTuple):
    """Pictures in their order: the prompt or class label of each, and what reads those with some numbers.

    `content` names which pictures they are.
    """

    prompts: list[Any]
    read: Callable[[range], Tensor]
    content: str


def encode_pictures(
    settings: Recipe,
    folder: Path,
    images: str,
    prompts: str | None = None,
    column: str | None = None,
    count: int | None = None,
    batch_size: int = 8,
    shard_size: int = 64,
) -> None:
    """Write this process's share of the pictures, as means of the VAE's latents in float32, in the recipe's first size.

    Args:
        images: a source of `dmdr-score`, a folder with a folder of pictures per class, or a built-in problem.
        prompts: a table of prompts, see `dmdr_rewards.score.prompts.with_prompts`.
        column: of the pictures in tables and data sets, see `dmdr_rewards.score.sources.find`.
        count: of pictures, at most, which the seed chooses; a built-in problem needs it.
        batch_size: pictures that are encoded at once.
        shard_size: pictures per file.

    Raises:
        UserError: there are no pictures, one of them has no prompt or cannot be read, the folder has other contents,
            or the disk is too small.
    """
    device = choose_device(settings.run, "fp32")
    family = load_family(settings, torch.float32)
    if images in DRAWN:
        source = drawn(images, count, settings.run.seed)
    else:
        source = found(images, prompts, column, count, settings.run.seed, family)
    shards = pictures_folder("--output", folder)
    shards.prepare(made_with(settings.model) | {"resolution": as_setting(family.size), "images": source.content})
    open_decoder(settings, family)
    family.to(device)

    @torch.no_grad()
    def make(rows: Sequence[int], done: Callable[[int], Any]) -> Made:
        parts = []
        for first in range(rows[0], rows[-1] + 1, batch_size):
            batch = range(first, min(first + batch_size, rows[-1] + 1))
            parts.append(family.encode(source.read(batch).to(device)).float())
            done(len(batch))
        return {"x0": torch.cat(parts).cpu().contiguous()}, {
            "prompts": json.dumps([source.prompts[row] for row in rows])
        }

    size = 4 * prod(family.latent_shape(*family.size))
    with naming("--output"):
        shards.remove_damaged()
        shards.write(shards.plan(len(source.prompts), shard_size), make, lambda: size, *processes())


def drawn(problem: str, count: int | None, seed: int) -> Source:
    """Pictures of a built-in problem, drawn by the seed. Captions are those of the training.

    Raises:
        UserError: there is no count.
    """
    from dmdr_train.problems import scenes
    from dmdr_train.problems.shapes import drawing

    if count is None:
        raise UserError("--count", f"is missing; say how many pictures of {problem} to draw")
    captions = scenes.training_captions()
    prompts: list[Any] = [captions[i % len(captions)] if problem == "scenes" else i % 10 for i in range(count)]

    def read(rows: range) -> Tensor:
        # A generator for each picture: a picture does not depend on the others of its batch.
        generators = [named_generator(seed, "pictures", row) for row in rows]
        each = zip((prompts[row] for row in rows), generators, strict=True)
        if problem == "scenes":
            return torch.cat([scenes.draw([caption], generator) for caption, generator in each])
        return torch.cat([drawing.draw(torch.tensor([label]), generator) for label, generator in each])

    return Source(prompts, read, f"{problem}, {count}, seed {seed}")


def found(images: str, prompts: str | None, column: str | None, count: int | None, seed: int, family: Family) -> Source:
    """The pictures that `images` names, with the prompts or the class labels that the family needs.

    Raises:
        UserError: there are none, or one has no prompt, or no label of the model.
    """
    try:
        items = with_prompts(find(images, column), prompts)
    except ScoreError as error:
        key, message = str(error).split(": ", 1)
        raise UserError("--images" if key == "IMAGES" else key, message) from error
    if count is not None:  # not the first ones, which may all be of one class
        chosen = torch.randperm(len(items), generator=named_generator(seed, "chosen pictures"))[:count]
        items = [items[i] for i in sorted(chosen.tolist())]
    if family.num_classes is None:
        given: list[Any] = [prompt_of(item) for item in items]
    else:
        folders = class_names(images, family.num_classes)
        given = [label_of(item, folders, family.num_classes) for item in items]

    def read(rows: range) -> Tensor:
        return torch.stack([picture(items[row], family.size) for row in rows])

    sizes = [item.source.stat().st_size if isinstance(item.source, Path) else None for item in items]
    names = json.dumps([[item.file_name, *more] for item, *more in zip(items, given, sizes, strict=True)])
    return Source(given, read, hashlib.sha256(names.encode()).hexdigest())


def prompt_of(item: Item) -> str:
    """The prompt of a picture.

    Raises:
        UserError: it has none.
    """
    if item.prompt is None:
        raise UserError("--images", f"{item.file_name} has no prompt; {FIX.format('prompt')}")
    return item.prompt


def label_of(item: Item, folders: list[str], num_classes: int) -> int:
    """The class label of a picture: the place of its folder among those of the classes, or else its own.

    Raises:
        UserError: it has none, or none of the model.
    """
    first = item.file_name.split("/")[0]
    label = item.label
    if first in folders:
        label = folders.index(first)
    elif label is None and item.prompt is not None:
        with naming("--images"):
            label = class_label(item.prompt, item.file_name)
    if label is None:
        fix = FIX.format("label")
        raise UserError(
            "--images",
            f"{item.file_name} has no class label; give a folder for each of the {num_classes} classes, or {fix}",
        )
    if not 0 <= label < num_classes:
        raise UserError("--images", f"{item.file_name} has the label {label}; the model has 0 to {num_classes - 1}")
    return label


def class_names(images: str, num_classes: int) -> list[str]:
    """The names of the folders in `images` if there is one for each class, sorted; otherwise none."""
    folders = [folder.name for folder in class_folders(Path(images))] if Path(images).is_dir() else []
    return folders if len(folders) == num_classes else []


def picture(item: Item, size: tuple[int, int]) -> Tensor:
    """A picture as `[3, H, W]` in [0, 1], resized to cover (H, W) and cut to its centre.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return fitted(open_picture(item.source), size)
    except ValueError as error:
        raise UserError("--images", f"{item.file_name} {error}; remove it") from error
