"""Where pictures and their prompts come from: a folder, a glob, a table, or a Hugging Face dataset on disk.

`find` lists the pictures without opening one; `open_picture`, which data-loading workers call, decodes them.
"""

import csv
import glob
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dmdr_rewards.base.errors import UserError, naming
from dmdr_rewards.base.safe_reading import from_json, inside, open_rgb

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
TABLES = frozenset({".parquet", ".jsonl", ".csv"})
_LIGHT = ("file_name", "prompt", "label")  # the columns of a table that are read at once, pictures are not


class Cell(Protocol):
    """A picture inside a table: small enough to be sent to a worker, which reads it there."""

    def value(self) -> Any:
        """The picture's bytes, or its path."""
        ...


@dataclass(frozen=True)
class ParquetCell:
    """Row `row` of row group `group`, counted from 0, in the column `image`."""

    table: Path
    group: int
    row: int

    def value(self) -> Any:
        return _bytes_or_path(_row_group(self.table, self.group)[self.row].as_py(), self.table.parent)


@dataclass(frozen=True)
class DatasetCell:
    """Row `row` of a dataset saved with `save_to_disk`, in the column `image`."""

    folder: Path
    row: int

    def value(self) -> Any:
        return _bytes_or_path(_dataset(self.folder)[self.row]["image"], self.folder)


@dataclass(frozen=True)
class Item:
    """A picture to score: its name in the output, where it lies, and the prompt or class label it is scored under."""

    file_name: str
    source: Path | ParquetCell | DatasetCell
    prompt: str | None = None
    label: int | None = None


def find(images: str) -> list[Item]:
    """The pictures that IMAGES names, with the prompts and labels that stand beside them.

    images  a folder (searched recursively, in the order of names), one picture, a glob, a table (`TABLES`) with
            pictures or their paths in `image` or `file_name` and optional columns `prompt` and `label`, or a Hugging
            Face dataset on disk with the same columns. Paths in a table count from its folder and stay in it.

    Names in the result are relative to the folder, to the part of a glob without wildcards, or as the table has them.
    Raises UserError where there is no picture.
    """
    path = Path(images)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        items = _from_dataset(path)
    elif path.is_dir():
        items = _from_files(glob.glob("**/*", root_dir=path, recursive=True), path)
    elif path.suffix.lower() in TABLES:
        with naming("IMAGES"):
            items = _from_parquet(path) if path.suffix.lower() == ".parquet" else _from_lines(path)
    elif path.is_file():
        items = _from_files([path.name], path.parent)
    else:
        root = Path(*_until_wildcard(path.parts))
        items = _from_files(glob.glob(str(path.relative_to(root)), root_dir=root, recursive=True), root)
    if not items:
        raise UserError("IMAGES", f"{images}: no picture there; give a folder, a glob, a table or a dataset on disk")
    return items


def with_prompts(items: Sequence[Item], table: str | None = None, prompt: str | None = None) -> list[Item]:
    """Give each picture its prompt: `prompt` for all, the one in `table`, its own, or that of its side-car .txt.

    table  .jsonl, .csv or .parquet with the columns `file_name` (as `find` names it) and `prompt` or `label`

    A picture that `table` does not list stays without. Raises UserError for a table without these columns, and for one
    that gives a picture two prompts.
    """
    if prompt is not None:
        return [replace(item, prompt=_text(prompt), label=None) for item in items]
    if table is not None:
        found = _prompts(Path(table))
        return [replace(item, **found.get(item.file_name, _prompt_and_label({}))) for item in items]
    return [_with_side_car(item) for item in items]


def require(items: Sequence[Item], rewards: dict[str, str]) -> list[Item]:
    """Check that each picture has what each reward scores it under; a prompt that is an integer is a label as well.

    rewards  name -> `RewardInfo.prompt`. Raises UserError that names the first picture without.
    """
    kinds = {kind: name for name, kind in rewards.items()}
    if "class_label" in kinds:
        items = [replace(item, label=_label(item, kinds["class_label"])) for item in items]
    if "text" in kinds:
        bare = next((item for item in items if item.prompt is None), None)
        if bare is not None:
            raise UserError("--prompts", f"picture {bare.file_name} has no prompt, which {kinds['text']} needs; {_FIX}")
    return list(items)


def open_picture(source: Path | Cell) -> Image.Image:
    """Decode a picture, to RGB. Raises ValueError that says why it cannot be read."""
    try:
        value = source if isinstance(source, Path) else source.value()
        return open_rgb(io.BytesIO(value) if isinstance(value, bytes) else value)
    except Exception as error:  # bytes that are no picture make decoders fail in any way
        raise ValueError(_text(f"cannot be read: {error or type(error).__name__}")) from error


_FIX = (
    "give a FILE that lists its file_name with a prompt (for a reward of classes: a label), --prompt TEXT for all, or "
    "a .txt of the same name beside each picture"
)


def _from_files(names: Iterable[str], root: Path) -> list[Item]:
    pictures = sorted(name for name in names if Path(name).suffix.lower() in ENDINGS and (root / name).is_file())
    return [Item(_text(Path(name).as_posix()), root / name) for name in pictures]


def _until_wildcard(parts: Sequence[str]) -> list[str]:
    plain: list[str] = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return plain


def _from_lines(path: Path) -> list[Item]:
    rows = _read_lines(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("image") or row.get("file_name"), str):
            raise UserError("IMAGES", f"{path}, row {number}: give each picture's path in `file_name` or `image`")
    return [
        _item(row, row.get("file_name") or row["image"], _in_table(path, row.get("image") or row["file_name"]))
        for row in rows
    ]


def _in_table(table: Path, name: Any) -> Path:
    if not isinstance(name, str):
        raise ValueError(f"{table} has the path {name!r}: give each picture's as text")
    try:
        return inside(table.parent, name)
    except ValueError as error:
        raise ValueError(f"{table}: {error}; put the table above its pictures") from None


def _bytes_or_path(value: Any, folder: Path) -> Any:
    """The picture in a cell: its bytes, or where it lies in `folder`."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    return inside(folder, value) if isinstance(value, str) else value


def _from_parquet(path: Path) -> list[Item]:
    import pyarrow.types as kinds

    file = _parquet(path)
    light = [name for name in _LIGHT if name in file.schema_arrow.names]
    if "image" in file.schema_arrow.names:
        kind = file.schema_arrow.field("image").type
        light += ["image"] * kinds.is_string(kind) + ["image.path"] * kinds.is_struct(kind)
    cells = [
        ParquetCell(path, group, row)
        for group in range(file.num_row_groups)
        for row in range(file.metadata.row_group(group).num_rows)
    ]
    with _readable(path):
        table = file.read(columns=light)
    return _from_arrow(table, file.schema_arrow, cells, path)


def _from_dataset(folder: Path) -> list[Item]:
    if (folder / "dataset_dict.json").is_file():
        index = folder / "dataset_dict.json"
        with naming("IMAGES"), _readable(index):
            splits = ", ".join(from_json(index.read_bytes())["splits"])
        raise UserError("IMAGES", f"{folder} holds several datasets: give one of {splits} as {folder}/NAME")
    with naming("IMAGES"), _readable(folder):
        table = _dataset(folder).with_format("arrow")[:]
        return _from_arrow(table, table.schema, [DatasetCell(folder, row) for row in range(len(table))], folder)


def _from_arrow(table: Any, schema: Any, cells: Sequence[Any], path: Path) -> list[Item]:
    """The items of an arrow table. `cells` reads the column `image`, of which `table` may hold the paths alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = table.select([name for name in _LIGHT if name in table.column_names]).to_pylist() or [{}] * len(cells)
    stored = "image" in schema.names and not pa.types.is_string(schema.field("image").type)
    if stored:
        names = [None] * len(cells)
        if pa.types.is_struct(schema.field("image").type):
            names = pc.struct_field(table["image"], "path").to_pylist()
        sources: Sequence[Any] = cells
    elif "image" in schema.names or "file_name" in schema.names:
        names = table["image" if "image" in schema.names else "file_name"].to_pylist()
        sources = [_in_table(path, name) for name in names]
    else:
        raise UserError(
            "IMAGES", f"{path} has the columns {', '.join(schema.names)}: one must be `image` or `file_name`"
        )
    return [
        _item(row, row.get("file_name") or name or f"row-{number:06d}", source)
        for number, (row, name, source) in enumerate(zip(rows, names, sources, strict=True))
    ]


def _item(row: dict[str, Any], name: str, source: Any) -> Item:
    return Item(_text(name), source, **_prompt_and_label(row))


def _prompts(path: Path) -> dict[str, dict[str, Any]]:
    with naming("--prompts"):
        rows = _read_table(path)
        if not rows or not all("file_name" in row and {"prompt", "label"} & row.keys() for row in rows):
            raise UserError("--prompts", f"{path} must have rows with `file_name` and `prompt` (or `label`)")
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            name, prompt = _text(row["file_name"]), _prompt_and_label(row)
            if found.setdefault(name, prompt) != prompt:
                raise UserError("--prompts", f"{path} lists {name} twice, with {found[name]} and {prompt}: keep one")
        return found


def _read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"{path}: give a file that ends in {', '.join(sorted(TABLES))}")
    if path.suffix.lower() != ".parquet":
        return _read_lines(path)
    file = _parquet(path)
    with _readable(path):
        return file.read(columns=[name for name in _LIGHT if name in file.schema_arrow.names]).to_pylist()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    with _readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            return list(csv.DictReader(file))
        rows = []
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = from_json(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: give one object with `file_name` and `prompt` per line")
                rows.append(row)
        return rows


def _prompt_and_label(row: dict[str, Any]) -> dict[str, Any]:
    prompt, label = row.get("prompt"), row.get("label")
    return {
        "prompt": None if prompt is None else _text(prompt),
        "label": None if label is None or label == "" else _integer(label, row.get("file_name", "a picture")),
    }


def _integer(value: Any, where: Any) -> int:
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        number = int(value)
        if abs(number) >= 1 << 63:
            raise ValueError
        return number
    except (TypeError, ValueError):
        raise ValueError(f"label {value!r} of {where} is no integer: class labels are counted from 0") from None


def _label(item: Item, reward: str) -> int:
    if item.label is not None:
        return item.label
    if item.prompt is None:
        raise UserError("--prompts", f"picture {item.file_name} has no class label, which {reward} needs; {_FIX}")
    with naming("--prompts"):
        return _integer(item.prompt, f"picture {item.file_name}, for {reward},")


def _with_side_car(item: Item) -> Item:
    if item.prompt is not None or item.label is not None or not isinstance(item.source, Path):
        return item
    text = item.source.with_suffix(".txt")
    if not text.is_file():
        return item
    with naming(f"side-car {text}"):
        return replace(item, prompt=_text(text.read_text(encoding="utf-8-sig").strip()))


def _text(value: Any) -> str:
    # Half a surrogate pair, from a file name or a cut JSON string, cannot be written to any of the outputs.
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    with _readable(path):
        return pq.ParquetFile(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file that a reader gives up on. Bytes of another format make readers fail in any way."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


@lru_cache(maxsize=1)
def _row_group(table: Path, group: int) -> Any:
    return _parquet(table).read_row_group(group, columns=["image"])["image"]


@lru_cache(maxsize=1)
def _dataset(folder: Path) -> Any:
    import datasets

    dataset = datasets.load_from_disk(os.fspath(folder))
    if isinstance(dataset.features.get("image"), datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    return dataset
