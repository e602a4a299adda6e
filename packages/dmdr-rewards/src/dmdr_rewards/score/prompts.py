"""The prompt or class label of each picture: from the command line, a table, or a file beside the picture."""

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dmdr_rewards.base.errors import UserError, naming
from dmdr_rewards.base.text_files import text_lines
from dmdr_rewards.score.sources import Item
from dmdr_rewards.score.tables import PROMPTS, class_label, prompts_and_label, read_rows, texts_in_order, writable

BESIDE = "prompts.jsonl"
"""A table beside the pictures that is read without being named; dmdr-generate writes it."""
_FIX = (
    "give a FILE that lists its file_name with a prompt (for a reward of classes: a label), --prompt TEXT for all, or "
    "a .txt of the same name beside each picture"
)


def with_prompts(items: Sequence[Item], table: str | None = None, prompt: str | None = None) -> list[Item]:
    """Give each picture its prompt: `prompt` for all, else from `table`, else its own, else from a file beside it.

    table  a table (`tables.ENDINGS`) with the columns `file_name` (as `sources.find` names it) and `prompt` or `label`;
           or a .txt file, or a .json list of texts, with one prompt per picture in the order of their names

    The files beside a picture are `BESIDE`, if it lists the picture, and a .txt of the picture's name. A picture with
    several prompts comes several times, once with each. A picture that `table` does not list has no
    prompt, and names that are no picture's cause a warning. Raises UserError for a table without these columns, for one
    whose names are all unknown, and for a number of texts other than that of the pictures.
    """
    if prompt is not None:
        return [replace(item, prompt=writable(prompt), label=None) for item in items]
    if table is None:
        return _from_beside(items)
    with naming("--prompts"):
        texts = texts_in_order(Path(table))
        if texts is not None:
            return _in_order(items, texts, table)
        found = _listed(Path(table))
        _check_names(found, items, table)
    return [replace(item, **each) for item in items for each in found.get(item.file_name, prompts_and_label({}))]


def require(items: Sequence[Item], rewards: dict[str, str]) -> list[Item]:
    """Check that each picture has the prompt or label that each reward needs. An integer prompt also serves as label.

    rewards  name -> `RewardInfo.prompt`

    Raises UserError that names the first picture without one.
    """
    kinds = {kind: name for name, kind in rewards.items()}
    if "class_label" in kinds:
        items = [replace(item, label=_label(item, kinds["class_label"])) for item in items]
    if "text" in kinds:
        bare = next((item for item in items if item.prompt is None), None)
        if bare is not None:
            raise UserError("--prompts", f"picture {bare.file_name} has no prompt, which {kinds['text']} needs; {_FIX}")
    return list(items)


def _in_order(items: Sequence[Item], texts: Sequence[str], path: str) -> list[Item]:
    if len(texts) != len(items):
        raise ValueError(f"{path} has {len(texts)} prompts for {len(items)} pictures: give one for each, in order")
    names = [item.file_name for item in items]
    for before, after in pairwise(names):
        if _numbers(before) > _numbers(after):
            raise ValueError(
                f"{path} gives the prompts in an order, but {before} comes before {after}: write the numbers in the "
                "names with equal lengths, or give a table with `file_name`"
            )
    return [replace(item, prompt=writable(text), label=None) for item, text in zip(items, texts, strict=True)]


def _numbers(name: str) -> list[tuple[int, int | str]]:
    """The name's numbers and the texts between them: compares as people count."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _listed(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The prompts and labels of a table, by the names of the pictures."""
    rows = read_rows(path)
    if not rows or not all("file_name" in row and {*PROMPTS, "label"} & row.keys() for row in rows):
        raise ValueError(f"{path} must have rows with `file_name` and `prompt` (or `label`)")
    return _by_name(rows)


def _by_name(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        known = found.setdefault(writable(row["file_name"]), [])
        known.extend(each for each in prompts_and_label(row) if each not in known)
    return found


def _check_names(found: Collection[str], items: Sequence[Item], path: str) -> None:
    names = {item.file_name for item in items}
    unknown = [name for name in found if name not in names]
    if len(unknown) == len(found):
        raise ValueError(
            f"{path} lists {unknown[0]}, and the first picture is called {items[0].file_name}: not one name of the "
            "table is a picture's; names are relative to IMAGES"
        )
    if unknown:
        warnings.warn(f"{path} lists names that are no picture's: {len(unknown)}, such as {unknown[0]}", stacklevel=2)


def _label(item: Item, reward: str) -> int:
    if item.label is not None:
        return item.label
    if item.prompt is None:
        raise UserError("--prompts", f"picture {item.file_name} has no class label, which {reward} needs; {_FIX}")
    with naming("--prompts"):
        return class_label(item.prompt, f"picture {item.file_name}, for {reward},")


def _from_beside(items: Sequence[Item]) -> list[Item]:
    tables: dict[Path, dict[str, list[dict[str, Any]]]] = {}
    found: list[Item] = []
    for item in items:
        if item.prompt is not None or item.label is not None or not isinstance(item.source, Path):
            found.append(item)
            continue
        folder = item.source.parent
        if folder not in tables:
            tables[folder] = _table_beside(folder / BESIDE)
        listed = tables[folder].get(writable(item.source.name))
        found += [replace(item, **each) for each in listed] if listed else [_with_side_car(item, item.source)]
    return found


def _table_beside(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows that list pictures. Others, as in a file of prompts for training, have no `file_name`."""
    if not path.is_file():
        return {}
    with naming("IMAGES"):
        return _by_name([row for row in read_rows(path) if "file_name" in row])


def _with_side_car(item: Item, source: Path) -> Item:
    text = source.with_suffix(".txt")
    if not text.is_file():
        return item
    with naming(f"side-car {text}"):
        return replace(item, prompt=writable("\n".join(line for _, line in text_lines(text)).strip()))
