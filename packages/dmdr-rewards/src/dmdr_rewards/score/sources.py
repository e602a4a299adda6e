"""The pictures to score: from a folder, a glob, a table, or a Hugging Face dataset on disk.

`find` lists the pictures without opening them. `open_picture` decodes one, in a data-loading worker.
"""

import glob
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dmdr_rewards.base.errors import UserError, naming
from dmdr_rewards.base.safe_reading import FORMATS, from_json, inside, open_rgb
from dmdr_rewards.score import files, tables
from dmdr_rewards.score.archives import from_npz, from_tar
from dmdr_rewards.score.cells import Cell, DatasetCell, ParquetCell, open_dataset
from dmdr_rewards.score.tables import LIGHT, open_parquet, prompts_and_label, read_lines, readable, writable

ENDINGS = frozenset(
    {
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".webp", ".bmp", ".dib", ".gif"),
        *(".tif", ".tiff", ".avif"),
    }
)
"""Endings of the pictures that are scored."""
_UNREAD = frozenset(
    {
        *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pnm", ".tga", ".exr", ".hdr", ".psd", ".svg"),
        *(".ico", ".dds", ".qoi", ".dng"),
    }
)
"""Endings of other pictures, which are left out with a warning."""

_ARCHIVES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Item:
    """A picture to score: its name in the output, its source, and its prompt or class label."""

    file_name: str
    source: Path | Cell
    prompt: str | None = None
    label: int | None = None


def find(images: str, column: str | None = None) -> list[Item]:
    """The pictures that IMAGES names, with the prompts and labels that are stored with them.

    images  a folder or a glob (searched recursively, in the order of names), one picture, a table (`tables.ENDINGS`)
            with pictures or their paths in `image` or `file_name` and optional columns `prompt` and `label`, an
            archive (`score.archives`), a folder or a glob of several tables or archives, or a Hugging Face dataset on
            disk with the same columns. Paths in a table are relative to its folder and must stay inside it
    column  of the pictures in parquet files and datasets; None takes `image`, or else the only column of pictures with
            their bytes and paths, as the hub stores them

    Names in the result are relative to the folder, to the part of a glob without wildcards, or as the table has them;
    of several tables or archives, the file's stem stands before each name. Raises UserError if there is no picture.
    """
    path = Path(images)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        items = _from_dataset(path, column)
    elif path.is_dir():
        items = _from_files(files.below(path), path, column)
    elif ending(path) in _READERS and not glob.has_magic(images):
        items = _from_table(path, column)
    elif path.is_file():
        items = _from_files([path.name], path.parent, column)
    else:
        root = files.until_wildcard(path)
        items = _from_files(files.matching(path, root), root, column)
    if not items:
        raise UserError("IMAGES", f"{images}: no picture there; give a folder, a glob, a table or a dataset on disk")
    return items


def ending(path: Path) -> str:
    """The ending of a file's name in lower case; `.tar.gz` counts as one."""
    last = path.suffix.lower()
    return ".tar.gz" if last == ".gz" and path.stem.lower().endswith(".tar") else last


def open_picture(source: Path | Cell) -> Image.Image:
    """Decode a picture to RGB. Raises ValueError that says why it cannot be read."""
    try:
        value = source if isinstance(source, Path) else source.value()
        if isinstance(value, Image.Image):  # from an array of pixels
            return value
        if value is None or value == b"":
            raise ValueError("nothing is there")
        return open_rgb(io.BytesIO(value) if isinstance(value, bytes) else value)
    except UnidentifiedImageError as error:  # whose text holds an address, another one in every run
        raise ValueError(f"cannot be read: it is damaged, or none of {', '.join(FORMATS)}") from error
    except Exception as error:  # decoders raise any exception for bytes that are not a picture
        raise ValueError(writable(f"cannot be read: {error or type(error).__name__}")) from error


def _from_files(names: Iterable[str], root: Path, column: str | None) -> list[Item]:
    """The pictures among these files; without any, those inside the tables and archives among them."""
    names = [name for name in names if (root / name).is_file()]
    by_ending = {name: ending(Path(name)) for name in names}
    pictures = [name for name in names if by_ending[name] in ENDINGS]
    shards = [name for name in names if by_ending[name] in _SHARDS and _holds_pictures(root / name, column)]
    unread = [name for name in names if by_ending[name] in _UNREAD] + (shards if pictures else [])
    if unread:
        endings = ", ".join(sorted({by_ending[name] for name in unread}))
        warnings.warn(
            f"IMAGES: pictures left out: {len(unread)}, such as {unread[0]} ({endings})",
            stacklevel=2,
        )
    if pictures:
        return [Item(writable(Path(name).as_posix()), root / name) for name in pictures]
    if len(shards) == 1:
        return _from_table(root / shards[0], column)
    return [
        replace(item, file_name=f"{writable(Path(name[: -len(by_ending[name])]).as_posix())}/{item.file_name}")
        for name in shards
        for item in _from_table(root / name, column)
    ]


def _holds_pictures(shard: Path, column: str | None) -> bool:
    """Whether a file is an archive, or a table with a column of pictures; a table of scores or prompts is not.

    A damaged table counts, so that it is not passed over without a word.
    """
    try:
        return ending(shard) in _ARCHIVES or _column(open_parquet(shard).schema_arrow, shard, column) is not None
    except UserError:  # of several columns, which its reader tells
        return True
    except (ValueError, OSError):
        return True


def _from_table(path: Path, column: str | None) -> list[Item]:
    with naming("IMAGES"):
        return _from_parquet(path, column) if ending(path) == ".parquet" else _READERS[ending(path)](path)


def _from_tar(path: Path) -> list[Item]:
    with readable(path):
        return [item for name, cell, row in from_tar(path, ENDINGS) for item in _items(row, name, cell)]


def _from_npz(path: Path) -> list[Item]:
    with readable(path):
        return [item for name, cell, row in from_npz(path) for item in _items(row, name, cell)]


def _from_lines(path: Path) -> list[Item]:
    rows = read_lines(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("image") or row.get("file_name"), str):
            raise UserError("IMAGES", f"{path}, row {number}: give each picture's path in `file_name` or `image`")
    return [
        item
        for row in rows
        for item in _items(
            row, row.get("file_name") or row["image"], _in_table(path, row.get("image") or row["file_name"])
        )
    ]


def _in_table(table: Path, name: Any) -> Path:
    if not isinstance(name, str):
        raise ValueError(f"{table} has the path {name!r}: give each picture's as text")
    try:
        return inside(table.parent, name)
    except ValueError as error:
        raise ValueError(f"{table}: {error}; put the table above its pictures") from None


def _from_parquet(path: Path, column: str | None) -> list[Item]:
    import pyarrow.types as kinds

    file = open_parquet(path)
    light = [name for name in LIGHT if name in file.schema_arrow.names]
    pictures = _column(file.schema_arrow, path, column)
    if pictures is not None:
        kind = file.schema_arrow.field(pictures).type
        light += [pictures] * _is_text(kind) + [f"{pictures}.path"] * (kinds.is_struct(kind) and _has_path(kind))
    cells = [
        ParquetCell(path, group, row, pictures or "image")
        for group in range(file.num_row_groups)
        for row in range(file.metadata.row_group(group).num_rows)
    ]
    with readable(path):
        table = file.read(columns=light)
    return _from_arrow(table, file.schema_arrow, cells, path, pictures)


def _from_dataset(folder: Path, column: str | None) -> list[Item]:
    if (folder / "dataset_dict.json").is_file():
        index = folder / "dataset_dict.json"
        with naming("IMAGES"), readable(index):
            splits = ", ".join(from_json(index.read_bytes())["splits"])
        raise UserError("IMAGES", f"{folder} holds several datasets: give one of {splits} as {folder}/NAME")
    with naming("IMAGES"), readable(folder):
        table = open_dataset(folder).with_format("arrow")[:]
        pictures = _column(table.schema, folder, column)
        cells = [DatasetCell(folder, row, pictures or "image") for row in range(len(table))]
        return _from_arrow(table, table.schema, cells, folder, pictures)


def _column(schema: Any, path: Path, given: str | None) -> str | None:
    """The column of pictures or of their paths; None if there is none.

    Raises UserError for a given column that is not there, and for several columns of pictures without `image`.
    """
    import pyarrow.types as kinds

    if given is not None:
        if given not in schema.names:
            raise UserError("--column", f"{path} has no column {given}, only {', '.join(schema.names)}")
        return given
    if "image" in schema.names:
        return "image"
    structs = [name for name in schema.names if kinds.is_struct(schema.field(name).type)]
    found = [name for name in structs if schema.field(name).type.get_field_index("bytes") >= 0]
    if len(found) > 1:
        raise UserError("IMAGES", f"{path} has several columns of pictures: give one of {', '.join(found)} as --column")
    return found[0] if found else None


def _has_path(struct: Any) -> bool:
    return struct.get_field_index("path") >= 0


def _from_arrow(table: Any, schema: Any, cells: Sequence[Any], path: Path, column: str | None) -> list[Item]:
    """The items of an arrow table. `cells` reads the column of pictures, of which `table` may hold the paths alone."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = table.select([name for name in LIGHT if name in table.column_names]).to_pylist() or [{}] * len(cells)
    kind = None if column is None else schema.field(column).type
    if kind is not None and not _is_text(kind):
        names = [None] * len(cells)
        if pa.types.is_struct(kind) and _has_path(kind):
            names = pc.struct_field(table[column], "path").to_pylist()
        sources: Sequence[Any] = cells
    elif column is not None or "file_name" in schema.names:
        names = table[column or "file_name"].to_pylist()
        sources = [_in_table(path, name) for name in names]
    else:
        raise UserError(
            "IMAGES",
            f"{path} has the columns {', '.join(schema.names)}: one must be `image` or `file_name`, or give --column",
        )
    return [
        item
        for number, (row, name, source) in enumerate(zip(rows, names, sources, strict=True))
        for item in _items(row, row.get("file_name") or name or f"row-{number:06d}", source)
    ]


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _items(row: dict[str, Any], name: str, source: Any) -> list[Item]:
    return [Item(writable(name), source, **each) for each in prompts_and_label(row)]


_READERS: dict[str, Callable[[Path], list[Item]]] = {
    **dict.fromkeys(tables.ENDINGS, _from_lines),
    **dict.fromkeys(_ARCHIVES, _from_tar),
    ".npz": _from_npz,
}
_SHARDS = (".parquet", *_ARCHIVES)
