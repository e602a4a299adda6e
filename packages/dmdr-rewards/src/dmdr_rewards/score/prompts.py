"""The prompt or class label of each picture: from the command line, a table, or a text file beside the picture."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmdr_rewards.base.errors import UserError, naming
from dmdr_rewards.base.text_files import text_lines
from dmdr_rewards.score.sources import Item
from dmdr_rewards.score.tables import PROMPTS, class_label, prompt_and_label, read_rows, writable

_FIX = (
    "give a FILE that lists its file_name with a prompt (for a reward of classes: a label), --prompt TEXT for all, or "
    "a .txt of the same name beside each picture"
)


def with_prompts(items: Sequence[Item], table: str | None = None, prompt: str | None = None) -> list[Item]:
    """Give each picture its prompt: `prompt` for all, else from `table`, else its own, else from the .txt beside it.

    table  a table (`tables.ENDINGS`) with the columns `file_name` (as `sources.find` names it) and `prompt` or `label`

    A picture that `table` does not list has no prompt. Raises UserError for a table without these columns, and for one
    that gives a picture two prompts.
    """
    if prompt is not None:
        return [replace(item, prompt=writable(prompt), label=None) for item in items]
    if table is not None:
        found = _listed(Path(table))
        return [replace(item, **found.get(item.file_name, prompt_and_label({}))) for item in items]
    return [_with_side_car(item) for item in items]


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


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """The prompts and labels of a table, by the names of the pictures."""
    with naming("--prompts"):
        rows = read_rows(path)
        if not rows or not all("file_name" in row and {*PROMPTS, "label"} & row.keys() for row in rows):
            raise UserError("--prompts", f"{path} must have rows with `file_name` and `prompt` (or `label`)")
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            name, prompt = writable(row["file_name"]), prompt_and_label(row)
            if found.setdefault(name, prompt) != prompt:
                raise UserError("--prompts", f"{path} lists {name} twice, with {found[name]} and {prompt}: keep one")
        return found


def _label(item: Item, reward: str) -> int:
    if item.label is not None:
        return item.label
    if item.prompt is None:
        raise UserError("--prompts", f"picture {item.file_name} has no class label, which {reward} needs; {_FIX}")
    with naming("--prompts"):
        return class_label(item.prompt, f"picture {item.file_name}, for {reward},")


def _with_side_car(item: Item) -> Item:
    if item.prompt is not None or item.label is not None or not isinstance(item.source, Path):
        return item
    text = item.source.with_suffix(".txt")
    if not text.is_file():
        return item
    with naming(f"side-car {text}"):
        return replace(item, prompt=writable("\n".join(line for _, line in text_lines(text)).strip()))
