"""GenEval: whether a picture shows the objects of its prompt, in the right number, colours and positions.

Source: "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment", arXiv 2310.11513, and its
release djghosh13/geneval (MIT). A detector finds the objects, and CLIP names the colour of each.

    a row of the metadata   {"prompt": …, "tag": …, "include": [clause, …], "exclude": [clause, …]}
    a clause                {"class": "dog", "count": 2, "color": "red", "position": ["left of", 0]}
    the score               1 if every clause of `include` holds and none of `exclude`, otherwise 0

A clause of `include` takes the `count` objects of its class in which the detector is most confident. All of them have
its colour, and lie in its position to each object of clause 0. Further objects do no harm; a clause of `exclude` with
count n holds from n objects on, and this is how the release asks for an exact number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.base.safe_reading import from_json
from dmdr_rewards.base.text_files import text_lines
from dmdr_rewards.interface import registry
from dmdr_rewards.interface.info import BUILT_IN
from dmdr_rewards.judges.judge import without_gradient
from dmdr_rewards.models.clip import ClipReward, shorter_side
from dmdr_rewards.networks.clip_towers import transformers_towers
from dmdr_rewards.networks.detector import Box, Detector, Found
from dmdr_rewards.pictures.images import Images
from dmdr_rewards.prompts.texts import as_texts

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_SENTENCES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
_RELATIONS = ("left of", "right of", "above", "below")
_CONFIDENCE = {"counting": 0.9}
_USUAL_CONFIDENCE = 0.3
_MOST = 16
"""Objects of a class, at most."""
_MARGIN = 0.1
"""The share of the sizes of two objects by which their centres may differ without being apart."""
_GREY = (153, 153, 153)
_IN_COCO = {"computer mouse": "mouse", "computer keyboard": "keyboard", "tv remote": "remote"}
"""GenEval's names of classes that have others in COCO."""


@dataclass(frozen=True)
class Clause:
    """Objects that a picture must, or must not, show; `target` is the number of the clause to which `relation` is."""

    name: str
    count: int
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Task:
    """What a picture of a prompt must show, and the confidence above which an object counts."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    confidence: float


class GenEval:
    """1 for a picture that shows what its prompt asks for, otherwise 0. No gradient.

    checkpoint  folder of a detector, see `networks.detector.Detector`; its classes have COCO's names
    metadata    GenEval's evaluation_metadata.jsonl, or other rows of its form; prompts are looked up in it
    clip, clip_model  the CLIP that names colours, needed if a row asks for one: a folder of a transformers CLIPModel,
                or checkpoint and architecture as for the reward `clip`. The release takes OpenAI's ViT-L/14

    Raises ValueError for files that are missing, damaged or of another form, and for classes that the detector lacks.
    """

    info = BUILT_IN["geneval"]

    def __init__(
        self,
        checkpoint: str | PathLike[str],
        metadata: str | PathLike[str] | None = None,
        clip: str | PathLike[str] | None = None,
        clip_model: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if metadata is None:
            raise MissingError("reward 'geneval' needs the option metadata, GenEval's evaluation_metadata.jsonl")
        self._path, self._tasks = metadata, read_tasks(Path(metadata))
        clauses = [each for task in self._tasks.values() for each in (*task.include, *task.exclude)]
        if clip is None and any(each.colour for each in clauses):
            raise ValueError(f"{metadata} asks for colours: give clip=FOLDER, of OpenAI's ViT-L/14 in the release")
        self._detector, self._device = Detector(Path(checkpoint), device, dtype), torch.device(device)
        if unknown := sorted({each.name for each in clauses if _coco(each.name) not in self._detector.classes}):
            raise ValueError(f"checkpoint {checkpoint} does not know {', '.join(unknown[:3])}: give a detector of COCO")
        self._clip: Any = None if clip is None else _clip(Path(clip), clip_model, device, dtype)
        self._embedded: dict[str, Tensor] = {}

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures, which may differ in size, under B texts -> float32 Tensor[B] of 0 and 1.

        Raises ValueError for pictures that cannot be scored or require a gradient, and for an unknown prompt.
        """
        pictures = without_gradient(images, self.info.name)
        texts = as_texts(prompts, len(pictures))
        if unknown := [text for text in texts if text not in self._tasks]:
            raise ValueError(f"prompt {unknown[0]!r} is not in {self._path}: give the metadata of these prompts")
        right = [self._is_right(picture, self._tasks[text]) for picture, text in zip(pictures, texts, strict=True)]
        return torch.tensor(right, dtype=torch.float32, device=self._device)

    def _is_right(self, picture: Image.Image, task: Task) -> bool:
        found: dict[str, list[Found]] = {}
        for each in self._detector(picture, task.confidence):
            found.setdefault(each.name, []).append(each)

        def objects(clause: Clause) -> list[Found]:
            return found.get(_coco(clause.name), [])[:_MOST]

        groups: list[list[Found] | None] = []
        for clause in task.include:
            chosen = objects(clause)[: clause.count]
            holds = (
                len(chosen) == clause.count
                and self._coloured(picture, chosen, clause)
                and placed(chosen, clause, groups)
            )
            groups.append(chosen if holds else None)
        return None not in groups and not any(len(objects(each)) >= each.count for each in task.exclude)

    def _coloured(self, picture: Image.Image, chosen: Sequence[Found], clause: Clause) -> bool:
        if clause.colour is None:
            return True
        crops = [_crop(picture, each) for each in chosen]
        closest = (self._clip.encode_image(crops) @ self._colours(clause.name).T).argmax(dim=1).tolist()
        return all(COLOURS[i] == clause.colour for i in closest)

    def _colours(self, name: str) -> Tensor:
        """The embeddings of the colours of an object, Tensor[10, D] of unit length: means over three sentences."""
        if name not in self._embedded:
            texts = [each.format(colour=colour, name=name) for colour in COLOURS for each in _SENTENCES]
            embedded = self._clip.encode_text(texts).unflatten(0, (len(COLOURS), len(_SENTENCES)))
            self._embedded[name] = F.normalize(embedded.mean(dim=1), dim=-1)
        return self._embedded[name]


def _clip(path: Path, model: str | None, device: str | torch.device, dtype: torch.dtype) -> Any:
    if model is None and (path / "config.json").is_file() and not (path / "open_clip_config.json").is_file():
        towers = transformers_towers(path, device, dtype)
        return ClipReward(towers, shorter_side(towers.image_size), BUILT_IN["clip"])
    options: dict[str, Any] = {} if model is None else {"model": model}
    return registry.create("clip", path, device, dtype, **options)


def placed(chosen: Sequence[Found], clause: Clause, groups: Sequence[Sequence[Found] | None]) -> bool:
    """Whether all these objects lie in the clause's relation to each object of its target; false if that is missing."""
    if clause.relation is None:
        return True
    targets = groups[clause.target]
    if targets is None:
        return False
    return all(clause.relation in relations(each.box, target.box) for each in chosen for target in targets)


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` lies, seen from `b`.

    The offset of the centres is shortened, in each direction, by a tenth of the sum of both sizes. `a` lies in a
    direction if this is more than half of the distance of the centres.
    """
    shortened, distance = [], 0.0
    for low, high in ((0, 2), (1, 3)):
        offset = (a[low] + a[high] - b[low] - b[high]) / 2
        margin = _MARGIN * (abs(a[high] - a[low]) + abs(b[high] - b[low]))
        shortened.append(max(abs(offset) - margin, 0.0) * (1 if offset > 0 else -1))
        distance += offset**2
    if max(map(abs, shortened)) < 1e-3:
        return set()
    x, y = (each / distance**0.5 for each in shortened)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {name for name, each in zip(_RELATIONS, holds, strict=True) if each}


def read_tasks(path: Path) -> dict[str, Task]:
    """The tasks of a .jsonl file in GenEval's form, by prompt.

    Raises ValueError or OSError for a file that is missing or of another form, and for a prompt with two tasks.
    """
    tasks: dict[str, Task] = {}
    for number, line in text_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = from_json(line)
            prompt, task = row["prompt"], _task(row)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{where} is no row of GenEval's metadata: {error!r}") from error
        if tasks.setdefault(prompt, task) != task:
            raise ValueError(f"{where}: the prompt {prompt!r} has another task above; leave one out")
    if not tasks:
        raise ValueError(f"{path} holds no row: give GenEval's evaluation_metadata.jsonl")
    return tasks


def _task(row: Mapping[str, Any]) -> Task:
    include = tuple(_clause(each, number) for number, each in enumerate(row["include"]))
    exclude = tuple(_clause(each, 0) for each in row.get("exclude", []))
    if not include:
        raise ValueError("include is empty")
    return Task(include, exclude, _CONFIDENCE.get(row["tag"], _USUAL_CONFIDENCE))


def _clause(given: Mapping[str, Any], above: int) -> Clause:
    """A clause; `above` is the number of clauses before it, to which its position may be."""
    clause = Clause(str(given["class"]), given["count"], given.get("color"), *given.get("position", ()))
    if not isinstance(clause.count, int) or clause.count < 1:
        raise ValueError(f"count is {clause.count!r}")
    if clause.colour not in (None, *COLOURS):
        raise ValueError(f"color is {clause.colour!r}, none of {', '.join(COLOURS)}")
    if clause.relation is not None and (clause.relation not in _RELATIONS or clause.target not in range(above)):
        raise ValueError(f"position is {given['position']!r}")
    return clause


def _coco(name: str) -> str:
    return _IN_COCO.get(name, name)


def _crop(picture: Image.Image, found: Found) -> Image.Image:
    """The box of an object; what lies beside its mask is grey."""
    if found.mask is not None:
        picture = Image.composite(picture, Image.new("RGB", picture.size, _GREY), Image.fromarray(found.mask))
    left, top, right, bottom = (round(side) for side in found.box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
