"""Sets of held-out prompts, in the files in which benchmarks publish them.

    .txt, .jsonl, .csv, .tsv, .parquet     a prompt per line or row: Parti's table; GenEval's metadata, a set per tag
    .json                                  a list of texts or of objects; styles with such lists, as HPSv2's benchmark;
                                           captions with their annotations, as COCO, whose first caption of each
                                           picture is taken
    a folder of .txt files                 a prompt per file, as DPG-Bench; its table has a row for each question about
                                           a prompt, whose first row is taken

The prompts of a row are those in its column prompt, caption or text, in upper or lower case, or else in its only column
of texts. Imports no torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmdr_models.base.text_files import text_lines
from dmdr_rewards.base.safe_reading import from_json

from dmdr_train.base.errors import UserError, naming
from dmdr_train.data.prompt_rows import SUFFIXES, USUAL_COLUMNS, batches_of, columns_of

KEY = "tracking.evaluation.prompt_files"
Sets = dict[str, list[str]]


def read_prompt_sets(files: Sequence[str]) -> Sets:
    """The prompts of files and folders, by the name of each set: a file's without suffix, and a style's within it.

    Raises:
        UserError: a file does not exist, is damaged, or holds no prompt, or two sets have one name.
    """
    found: Sets = {}
    for i, file in enumerate(files):
        for name, prompts in _read(f"{KEY}.{i}", Path(file)).items():
            if name in found:
                raise UserError(f"{KEY}.{i}", f"{file} is the second set with the name {name}; rename the file")
            if not prompts:
                raise UserError(f"{KEY}.{i}", f"{file} holds no prompt in {name}; put some there")
            found[name] = prompts
    return found


def _read(key: str, path: Path) -> Sets:
    if not os.path.exists(path):
        raise UserError(key, f"no file or folder {str(path)!r}; give one that exists")
    suffix = path.suffix.lower()
    with naming(key):
        if path.is_dir():
            return {path.name: _folder(path)}
        if suffix == ".json":
            return _json(path)
        if suffix not in SUFFIXES:
            known = ", ".join((*SUFFIXES, ".json"))
            raise ValueError(f"{path} has no known suffix; give a folder, or a file in {known}")
        columns = {name: column.is_text for name, column in columns_of(path).items()}
        prompts = _rows(path, _column(path, columns))
        if {"tag", "include"} <= columns.keys():  # GenEval's score is the mean over its tags
            tags = _rows(path, "tag")
            if len(tags) != len(prompts):
                raise ValueError(f"{path} has {len(prompts)} prompts and {len(tags)} tags; give both in every row")
            return {f"{path.stem}/{tag}": [p for p, t in zip(prompts, tags, strict=True) if t == tag] for tag in tags}
        if {"item_id", "proposition_id"} <= columns.keys():  # DPG-Bench's table
            prompts = list(dict.fromkeys(prompts))
        return {path.stem: prompts}


def _rows(path: Path, column: str) -> list[str]:
    return [text for batch in batches_of(path, column) for text in batch]


def _column(path: Path, columns: dict[str, bool]) -> str:
    text = [name for name, is_text in columns.items() if is_text]
    usual = [name for each in USUAL_COLUMNS for name in text if name.lower() == each]
    if not usual and len(text) != 1:
        raise ValueError(f"{path} has no column prompt, caption or text, only {', '.join(columns)}; rename one")
    return (usual or text)[0]


def _folder(path: Path) -> list[str]:
    """The prompts of a folder's .txt files in the order of their names, the lines of each joined."""
    files = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() == ".txt" and file.is_file())
    if not files:
        raise ValueError(f"{path} holds no .txt file; give a folder with a prompt in each")
    texts = [" ".join(line.strip() for _, line in text_lines(file) if line.strip()) for file in files]
    return [text for text in texts if text]


def _json(path: Path) -> Sets:
    try:
        data = from_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        first: dict[Any, Any] = {}
        for place, row in enumerate(data["annotations"]):
            if isinstance(row, dict):
                first.setdefault(row.get("image_id", -1 - place), row)
        return {path.stem: _texts(path, list(first.values()))}
    if isinstance(data, dict) and all(isinstance(part, list) for part in data.values()):
        return {f"{path.stem}/{name}": _texts(path, part) for name, part in data.items()}
    if not isinstance(data, list):
        raise ValueError(f"{path} is no list; give a list of texts or of objects, or lists by style")
    return {path.stem: _texts(path, data)}


def _texts(path: Path, rows: list[Any]) -> list[str]:
    found = []
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            row = next((row[name] for each in USUAL_COLUMNS for name in row if name.lower() == each), None)
        if not isinstance(row, str):
            raise ValueError(f"entry {number} of {path} has no text in prompt, caption or text; give each entry one")
        try:
            row.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"entry {number} of {path} cannot be UTF-8 ({error.reason}); mend it") from None
        if row.strip():
            found.append(row.strip())
    return found
