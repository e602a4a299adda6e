"""The prompts of a recipe: a text file with a prompt per line, a table, a dataset's folder or its hub name.

`check_prompts` finds mistakes without a slow import; `open_prompts` opens the prompts with Hugging Face `datasets`,
which leaves the texts on the disk. Files on this disk are read by `prompt_rows`, alone as well as in a folder; the
library reads what other programs have made: saved datasets, compressed files, the hub.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmdr_models.base.text_files import text_prompts

from dmdr_train.base.errors import UserError, naming
from dmdr_train.data.prompt_rows import SUFFIXES, USUAL_COLUMNS, Column, columns_of
from dmdr_train.recipe.schema import Data

IMPLICIT_INDEX = "__index_level_0__"
"""The column into which pandas puts the first field of rows that are longer than their header."""


def evaluation_prompts() -> list[str]:
    """The built-in list of 64 prompts: people, animals, places, things, styles, counts, colours, positions, writing."""
    return text_prompts(Path(__file__).parent / "evaluation_prompts.txt")


def check_prompts(data: Data) -> None:
    """Check `data.prompts`, `data.name` and `data.column` as far as possible without a slow import.

    Files are read whole; folders and hub names are read when they are opened.

    Raises:
        UserError: the file or folder does not exist, has an unknown suffix, no prompt or no such column, is not
            UTF-8, or has a damaged row.
    """
    if data.prompts is None:
        return
    path = Path(data.prompts)
    if os.path.isfile(path):
        if path.suffix.lower() not in SUFFIXES:
            raise UserError("data.prompts", f"{path} has no known suffix; give a file in {', '.join(SUFFIXES)}")
        column_of_files(data, [path])
    elif os.path.isdir(path):
        if not any(path.iterdir()):
            raise UserError("data.prompts", f"folder {path} is empty; give one that holds a dataset")
    elif path.is_absolute() or path.suffix in SUFFIXES or data.prompts[:1] in ".~" or len(path.parts) != 2:
        raise UserError(
            "data.prompts", f"no file or folder {data.prompts!r}; give one that exists, or a hub name (owner/name)"
        )
    if data.name is not None and (path.is_file() or is_saved(path)):
        raise UserError("data.name", f"{path} has no configurations; leave it out")


def column_of_files(data: Data, files: Sequence[Path]) -> str:
    """The column of the prompts in files, as `choose_column`.

    Raises:
        UserError: a file is empty or damaged, or there is no such column, or a file lacks it.
    """
    columns: dict[str, Column] = {}
    found: dict[Path, dict[str, Column]] = {}
    for path in files:
        with naming("data.prompts"):
            found[path] = columns_of(path, data.column)
        for name, each in found[path].items():
            known = columns.get(name, Column(False))
            columns[name] = Column(known.is_text or each.is_text, known.mixed or each.mixed)
    column = choose_column(data, {name: each.is_text for name, each in columns.items()})
    if columns[column].mixed:
        raise UserError("data.prompts", columns[column].mixed)
    for path, own in found.items():
        if column not in own:
            raise UserError(
                "data.prompts", f"{path} has no column {column}, only {', '.join(own)}; rename one, or move the file"
            )
    return column


def choose_column(data: Data, columns: Mapping[str, bool]) -> str:
    """The column of the prompts: `data.column`, otherwise a column with a usual name, otherwise the only text column.

    Args:
        columns: names, and whether a column holds text.

    Raises:
        UserError: the column does not exist or holds no text, or the choice is ambiguous.
    """
    text = [name for name, is_text in columns.items() if is_text]
    if not text:
        raise UserError(
            "data.prompts", f"{data.prompts} has no text, only {', '.join(columns)}; give a column of texts"
        )
    if data.column is None:
        usual = [name for name in USUAL_COLUMNS if name in text]
        if not usual and len(text) > 1:
            raise UserError("data.column", f"is null and {data.prompts} has texts in {', '.join(text)}; name one")
        return (usual or text)[0]
    if data.column not in text:
        near = difflib.get_close_matches(data.column, text, n=1)
        problem = "holds no text" if data.column in columns else "is not there"
        hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(text)}"
        raise UserError("data.column", f"{data.column!r} of {data.prompts} {problem}; {hint}")
    return data.column


def open_prompts(data: Data) -> Any:
    """Open the prompts as a `datasets.Dataset` with the column `prompt`, or as an IterableDataset if `data.streaming`.

    Blank prompts are left out.

    Raises:
        UserError: a mistake that `check_prompts` cannot find: a damaged dataset, an unknown hub name, configuration,
            split or column.
    """
    try:
        texts = _load(data)
        if next(iter(texts), None) is None:
            raise UserError("data.prompts", f"{data.prompts} holds no prompt; put some there")
    except UserError:
        raise
    except Exception as error:  # readers of damaged files raise any exception
        if isinstance(error.__cause__, UserError):  # of `prompt_builder`, which the library wraps
            raise error.__cause__ from None
        raise UserError("data.prompts", f"{data.prompts} cannot be read: {error.__cause__ or error}") from error
    return texts


def choose_split(data: Data, splits: Any) -> Any:
    """Choose the split `data.split` of a dataset; a dataset without splits is returned unchanged.

    Raises:
        UserError: the split does not exist.
    """
    if not isinstance(splits, dict):
        return splits
    if data.split not in splits:
        raise UserError(
            "data.split", f"{data.prompts} has no split {data.split!r}; valid are {', '.join(map(str, splits))}"
        )
    return splits[data.split]


def is_saved(path: Path) -> bool:
    """Whether a folder holds what `save_to_disk` wrote."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _load(data: Data) -> Any:
    import datasets

    from dmdr_train.data.prompt_builder import read_files

    assert data.prompts is not None
    path = Path(data.prompts)
    if is_saved(path):
        saved = choose_split(data, datasets.load_from_disk(str(path)))
        return _texts(data, saved.to_iterable_dataset() if data.streaming else saved)
    splits: Any = None
    if path.is_file():
        splits = {"train": [path]}
    else:
        builder = _builder(data)
        splits = builder.config.data_files if path.is_dir() else None
        if splits and builder.config.name == "default":
            _check_all_read(path, [Path(file) for files in splits.values() for file in files])
    files = [Path(file) for file in choose_split(data, splits)] if splits else []
    if files and all(file.suffix.lower() in SUFFIXES for file in files):
        return read_files(files, column_of_files(data, files), data.streaming)
    if data.streaming:
        return _texts(data, choose_split(data, builder.as_streaming_dataset()))
    builder.download_and_prepare()
    return _texts(data, choose_split(data, builder.as_dataset()))


def _check_all_read(folder: Path, read: Sequence[Path]) -> None:
    """Refuse a folder with files of several formats, of which the library reads one without a word.

    Raises:
        UserError: a file of prompts is left out.
    """
    formats = {file.suffix.lower() for file in read}
    others = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not _hidden(folder, file))
    left = next((file for file in others if file.suffix.lower() not in formats), None)
    if left is not None:
        raise UserError(
            "data.prompts",
            f"{folder} holds files of several formats, {read[0].name} and {left.name}; give one file, "
            "or a folder with one format",
        )


def _hidden(folder: Path, file: Path) -> bool:
    return any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)


def _builder(data: Data) -> Any:
    """The library's reader of a folder or a hub name.

    Raises:
        UserError: there is no such configuration, or `data.name` leaves several.
    """
    import datasets

    assert data.prompts is not None
    if data.name is not None:
        names = datasets.get_dataset_config_names(data.prompts)
        if data.name not in names:
            raise UserError(
                "data.name", f"{data.prompts} has no configuration {data.name!r}; valid are {', '.join(names)}"
            )
    try:
        return datasets.load_dataset_builder(data.prompts, data.name)
    except ValueError as error:
        if data.name is not None or "Config name is missing" not in str(error):
            raise
        names = datasets.get_dataset_config_names(data.prompts)
        raise UserError(
            "data.name", f"is null and {data.prompts} has the configurations {', '.join(names)}; name one"
        ) from None


def _texts(data: Data, dataset: Any) -> Any:
    """The prompts of a dataset that the library has read."""
    import datasets

    features = dataset.features
    if features is None:  # a stream has no columns before its first rows, of which some may lack a field
        rows = list(dataset.take(1000))
        names = dict.fromkeys(name for row in rows for name in row)
        features = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}).features
    if dataset.info.builder_name == "csv":
        _check_csv(data, features)
    column = choose_column(data, {name: _holds_text(kind) for name, kind in features.items()})
    texts = dataset.select_columns([column])
    texts = texts if column == "prompt" else texts.rename_column(column, "prompt")
    # Only the numbers of the kept rows are in memory; a file with them would be written to the user's folder.
    return texts.filter(_is_prompt, input_columns="prompt", **({} if data.streaming else {"keep_in_memory": True}))


def _check_csv(data: Data, columns: Mapping[str, Any]) -> None:
    """Refuse a table that the library has read with another meaning, which it does without a word.

    Raises:
        UserError: rows are longer than the header, or not separated by commas.
    """
    if IMPLICIT_INDEX in columns:
        raise UserError(
            "data.prompts", f"rows of {data.prompts} are longer than their header; put quotes around texts with commas"
        )
    for name in columns:
        if ";" in name or "\t" in name:
            raise UserError(
                "data.prompts", f"the header {name!r} of {data.prompts} has no commas; separate the columns by commas"
            )


def _holds_text(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string", "string_view")


def _is_prompt(text: str | None) -> bool:
    return text is not None and bool(text.strip())
