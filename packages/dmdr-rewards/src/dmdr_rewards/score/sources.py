"""The pictures to score: from a folder, a glob, a table, or a Hugging Face dataset on disk.

`find` lists the pictures without opening them. `open_picture` decodes one, in a data-loading worker.
"""

import glob
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dmdr_rewards.base.errors import UserError, naming
from dmdr_rewards.base.safe_reading import from_json, inside, open_rgb
from dmdr_rewards.score import tables
from dmdr_rewards.score.tables import LIGHT, open_parquet, prompt_and_label, read_lines, readable, writable

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})


class Cell(Protocol):
    """The place of a picture inside a table: small enough to be sent to a worker, which reads the picture there."""

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
    """A picture to score: its name in the output, its source, and its prompt or class label."""

    file_name: str
    source: Path | ParquetCell | DatasetCell
    prompt: str | None = None
    label: int | None = None


def find(images: str) -> list[Item]:
    """The pictures that IMAGES names, with the prompts and labels that are stored with them.

    images  a folder (searched recursively, in the order of names), one picture, a glob, a table (`tables.ENDINGS`)
            with pictures or their paths in `image` or `file_name` and optional columns `prompt` and `label`, or a
            Hugging Face dataset on disk with the same columns. Paths in a table are relative to its folder and must
            stay inside it

    Names in the result are relative to the folder, to the part of a glob without wildcards, or as the table has them.
    Raises UserError if there is no picture.
    """
    path = Path(images)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        items = _from_dataset(path)
    elif path.is_dir():
        items = _from_files(glob.glob("**/*", root_dir=path, recursive=True), path)
    elif path.suffix.lower() in tables.ENDINGS:
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


def open_picture(source: Path | Cell) -> Image.Image:
    """Decode a picture to RGB. Raises ValueError that says why it cannot be read."""
    try:
        value = source if isinstance(source, Path) else source.value()
        return open_rgb(io.BytesIO(value) if isinstance(value, bytes) else value)
    except Exception as error:  # decoders raise any exception for bytes that are not a picture
        raise ValueError(writable(f"cannot be read: {error or type(error).__name__}")) from error


def _from_files(names: Iterable[str], root: Path) -> list[Item]:
    pictures = sorted(name for name in names if Path(name).suffix.lower() in ENDINGS and (root / name).is_file())
    return [Item(writable(Path(name).as_posix()), root / name) for name in pictures]


def _until_wildcard(parts: Sequence[str]) -> list[str]:
    plain: list[str] = []
    for part in parts[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return plain


def _from_lines(path: Path) -> list[Item]:
    rows = read_lines(path)
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
    """The picture in a cell: its bytes, or its path in `folder`."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    return inside(folder, value) if isinstance(value, str) else value


def _from_parquet(path: Path) -> list[Item]:
    import pyarrow.types as kinds

    file = open_parquet(path)
    light = [name for name in LIGHT if name in file.schema_arrow.names]
    if "image" in file.schema_arrow.names:
        kind = file.schema_arrow.field("image").type
        light += ["image"] * kinds.is_string(kind) + ["image.path"] * kinds.is_struct(kind)
    cells = [
        ParquetCell(path, group, row)
        for group in range(file.num_row_groups)
        for row in range(file.metadata.row_group(group).num_rows)
    ]
    with readable(path):
        table = file.read(columns=light)
    return _from_arrow(table, file.schema_arrow, cells, path)


def _from_dataset(folder: Path) -> list[Item]:
    if (folder / "dataset_dict.json").is_file():
        index = folder / "dataset_dict.json"
        with naming("IMAGES"), readable(index):
            splits = ", ".join(from_json(index.read_bytes())["splits"])
        raise UserError("IMAGES", f"{folder} holds several datasets: give one of {splits} as {folder}/NAME")
    with naming("IMAGES"), readable(folder):
        table = _dataset(folder).with_format("arrow")[:]
        return _from_arrow(table, table.schema, [DatasetCell(folder, row) for row in range(len(table))], folder)


def _from_arrow(table: Any, schema: Any, cells: Sequence[Any], path: Path) -> list[Item]:
    """The items of an arrow table. `cells` reads the column `image`; `table` may hold only the paths of that column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = table.select([name for name in LIGHT if name in table.column_names]).to_pylist() or [{}] * len(cells)
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
    return Item(writable(name), source, **prompt_and_label(row))


@lru_cache(maxsize=1)
def _row_group(table: Path, group: int) -> Any:
    return open_parquet(table).read_row_group(group, columns=["image"])["image"]


@lru_cache(maxsize=1)
def _dataset(folder: Path) -> Any:
    import datasets

    dataset = datasets.load_from_disk(os.fspath(folder))
    if isinstance(dataset.features.get("image"), datasets.Image):
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    return dataset
