"""Files of prompts: a text file with a prompt per line, .jsonl, .csv or .parquet, a dataset's folder or its hub name.

`check_prompts` finds mistakes without a slow import; `open_prompts` opens the prompts with Hugging Face `datasets`,
which leaves the texts on the disk.
"""

import csv
import difflib
import json
import os
from pathlib import Path
from typing import Any

from dmdr_train.base.errors import UserError
from dmdr_train.recipe.schema import Data

# By the suffix of a file: the name of the reader in `datasets`, and its options.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"encoding": "utf-8-sig", "keep_default_na": False}),
    ".parquet": ("parquet", {}),
}
USUAL_COLUMNS = ("prompt", "caption", "text")


def evaluation_prompts() -> list[str]:
    """The built-in list of 64 prompts: people, animals, places, things, styles, counts, colours, positions, writing."""
    return (Path(__file__).parent / "evaluation_prompts.txt").read_text(encoding="utf-8").splitlines()


def check_prompts(data: Data) -> None:
    """Check `data.prompts` and `data.column` as far as possible without a slow import; a hub name passes.

    Raises:
        UserError: the file or folder does not exist, has an unknown suffix, no prompt or no such column, or is not
            UTF-8.
    """
    if data.prompts is None:
        return
    path = Path(data.prompts)
    if os.path.isfile(path):
        if path.suffix.lower() not in READERS:
            raise UserError("data.prompts", f"{path} has no known suffix; give a file in {', '.join(READERS)}")
        try:
            columns = columns_of(path)
        except UserError:
            raise
        except Exception as error:  # readers of damaged files raise any exception
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
    """The columns of a file, and whether they are texts, as its first row says.

    Raises:
        UserError: the file has no row, or is not UTF-8.
        ValueError: the file has another format than its suffix says.
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
    """Return the first lines that are not blank. The whole file is read, so that a mistake shows before the training.

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
    """Open the prompts as a `datasets.Dataset` with the column `prompt`, or as an IterableDataset if `data.streaming`.

    Blank prompts are left out.

    Raises:
        UserError: a mistake that `check_prompts` cannot find: a damaged file, an unknown hub name, split or column.
    """
    import datasets

    try:
        dataset = choose_split(data, _load(data))
        features = dataset.features
        if features is None:  # a stream has no columns before its first rows
            features = datasets.Dataset.from_list(list(dataset.take(100))).features
        column = choose_column(
            data, {name: getattr(kind, "dtype", "") in ("string", "large_string") for name, kind in features.items()}
        )
        texts = dataset.select_columns([column])
        texts = texts if column == "prompt" else texts.rename_column(column, "prompt")
        # Only the numbers of the kept rows are in memory; a file with them would be written to the user's folder.
        texts = texts.filter(_is_prompt, input_columns="prompt", **({} if data.streaming else {"keep_in_memory": True}))
        if next(iter(texts), None) is None:
            raise UserError("data.prompts", f"{data.prompts} holds no prompt; put some there")
    except UserError:
        raise
    except Exception as error:  # readers of damaged files raise any exception
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
