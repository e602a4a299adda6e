"""Files of prompts: a text file with a prompt per line, .jsonl, .csv or .parquet, a dataset's folder or its hub name.

`check_prompts` says what is wrong with them before anything large is imported; `open_prompts` opens them with Hugging
Face `datasets`, which leaves the texts on disk.
"""

import csv
import difflib
import json
import os
from pathlib import Path
from typing import Any

from dmdr_train.base.errors import UserError
from dmdr_train.recipe.schema import Data

# How `datasets` calls the reader of each ending, and what it has to be told.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"encoding": "utf-8-sig", "keep_default_na": False}),
    ".parquet": ("parquet", {}),
}
USUAL_COLUMNS = ("prompt", "caption", "text")


def evaluation_prompts() -> list[str]:
    """Sixty-four prompts of our own: people, animals, places, things, styles, counts, colours, positions, writing."""
    return (Path(__file__).parent / "evaluation_prompts.txt").read_text(encoding="utf-8").splitlines()


def check_prompts(data: Data) -> None:
    """Check `data.prompts` and `data.column` as far as that goes without a large import; a hub name passes.

    Raises:
        UserError: no such file or folder; a file of unknown ending, without a prompt, or not UTF-8; no such column.
    """
    if data.prompts is None:
        return
    path = Path(data.prompts)
    if os.path.isfile(path):
        if path.suffix.lower() not in READERS:
            raise UserError("data.prompts", f"{path} has no ending that is known; give a file in {', '.join(READERS)}")
        try:
            columns = columns_of(path)
        except UserError:
            raise
        except Exception as error:  # bytes of another format make readers fail in any way
            raise UserError("data.prompts", f"{path} cannot be read: {error}; give a {path.suffix} file") from None
        choose_column(data, columns)
    elif os.path.isdir(path):
        if not any(path.iterdir()):
            raise UserError("data.prompts", f"folder {path} is empty; give one that holds a dataset")
    elif path.is_absolute() or path.suffix in READERS or data.prompts[:1] in ".~" or len(path.parts) != 2:
        raise UserError(
            "data.prompts", f"no file or folder {data.prompts!r}; give one that exists, or a hub name (owner/name)"
        )


def columns_of(path: Path) -> dict[str, bool]:
    """The columns of a file, and whether they hold text, judged by its first row.

    Raises:
        UserError: it holds no row, or is not UTF-8.
        ValueError: it is not what its ending says.
    """
    ending = path.suffix.lower()
    if ending == ".parquet":
        from pyarrow import parquet, types

        found = parquet.read_metadata(path)
        rows = found.num_rows
        columns = {
            field.name: types.is_string(field.type) or types.is_large_string(field.type)
            for field in found.schema.to_arrow_schema()
        }
    else:
        lines = first_lines(path, 2)
        rows = len(lines)
        if ending == ".csv":
            columns = dict.fromkeys(next(csv.reader(lines), []), True)
            rows -= 1
        elif ending == ".jsonl":
            row = json.loads(lines[0]) if lines else {}
            if not isinstance(row, dict):
                raise UserError(
                    "data.prompts", f'{path} must hold objects, one per line, such as {{"prompt": "a cat"}}'
                )
            columns = {name: isinstance(value, str) for name, value in row.items()}
        else:
            columns = {"text": True}
    if rows < 1:
        raise UserError("data.prompts", f"{path} holds no prompt; put some there")
    return columns


def first_lines(path: Path, count: int) -> list[str]:
    """The first lines that are not blank. All are read: what is wrong with the last is better known now than later.

    Raises:
        UserError: a line is not UTF-8.
    """
    kept: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(
                    "data.prompts", f"line {number} of {path} is not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from None
            if len(kept) < count and text.strip():
                kept.append(text)
    return kept


def choose_column(data: Data, columns: dict[str, bool]) -> str:
    """The column of the prompts: `data.column`, or the one that is called as usual, or the only one with text.

    Args:
        columns: name -> whether it holds text.

    Raises:
        UserError: there is no such column, it holds no text, or several might be meant.
    """
    text = [name for name, is_text in columns.items() if is_text]
    if not text:
        raise UserError(
            "data.prompts", f"{data.prompts} has no text, only {', '.join(columns)}; give a column of texts"
        )
    if data.column is None:
        likely = [name for name in USUAL_COLUMNS if name in text] or text
        if len(likely) > 1 and likely == text:
            raise UserError("data.column", f"is null and {data.prompts} has texts in {', '.join(text)}; name one")
        return likely[0]
    if data.column not in text:
        near = difflib.get_close_matches(data.column, text, n=1)
        problem = "holds no text" if data.column in columns else "is not there"
        hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(text)}"
        raise UserError("data.column", f"{data.column!r} of {data.prompts} {problem}; {hint}")
    return data.column


def open_prompts(data: Data) -> Any:
    """The prompts as a `datasets.Dataset` with the one column `prompt`, or as an IterableDataset if `data.streaming`.

    White space around a prompt is no part of it, and blank ones are left out.

    Raises:
        UserError: what `check_prompts` could not see: a damaged file, an unknown hub name, no such split or column.
    """
    import datasets

    try:
        dataset = choose_split(data, _load(data))
        features = dataset.features
        if features is None:  # a stream tells its columns with its rows
            features = datasets.Dataset.from_list(list(dataset.take(100))).features
        column = choose_column(
            data, {name: getattr(kind, "dtype", "") in ("string", "large_string") for name, kind in features.items()}
        )
        texts = dataset.select_columns([column])
        texts = texts if column == "prompt" else texts.rename_column(column, "prompt")
        # In memory: the positions of the rows that stay, nothing else; on disk they would lie in the user's folder.
        texts = texts.filter(_is_prompt, input_columns="prompt", **({} if data.streaming else {"keep_in_memory": True}))
        if next(iter(texts), None) is None:
            raise UserError("data.prompts", f"{data.prompts} holds no prompt; put some there")
    except UserError:
        raise
    except Exception as error:  # readers fail in any way on bytes of another format
        raise UserError("data.prompts", f"{data.prompts} cannot be read: {error.__cause__ or error}") from error
    return texts


def choose_split(data: Data, splits: Any) -> Any:
    """One of the splits of a dataset; a dataset without splits is taken as it is.

    Raises:
        UserError: there is no such split.
    """
    if not isinstance(splits, dict):
        return splits
    if data.split not in splits:
        raise UserError("data.split", f"{data.prompts} has no split {data.split!r}; valid are {', '.join(splits)}")
    return splits[data.split]


def _load(data: Data) -> Any:
    import datasets

    assert data.prompts is not None
    path = Path(data.prompts)
    if path.is_file():
        reader, options = READERS[path.suffix.lower()]
        return datasets.load_dataset(reader, data_files=str(path), streaming=data.streaming, **options)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = choose_split(data, datasets.load_from_disk(str(path)))
        return saved.to_iterable_dataset() if data.streaming else saved
    return datasets.load_dataset(data.prompts, streaming=data.streaming)


def _is_prompt(text: str | None) -> bool:
    return text is not None and bool(text.strip())
