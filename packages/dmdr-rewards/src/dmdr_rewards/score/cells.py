"""The places of pictures inside of tables, archives and datasets: small enough to be sent to a worker, which reads one.

The reader of a worker holds a few pictures, never a whole row group.
"""

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from dmdr_rewards.base.safe_reading import inside
from dmdr_rewards.score.tables import open_parquet

_ROWS_AT_ONCE = 8
_LARGEST = 1 << 30  # bytes of one picture; a damaged or hostile archive may claim any size


class Cell(Protocol):
    """The place of one picture."""

    def value(self) -> Any:
        """The picture's bytes, or its path."""
        ...


@dataclass(frozen=True)
class ParquetCell:
    """Row `row` of row group `group`, counted from 0, in a column of pictures or of their paths."""

    table: Path
    group: int
    row: int
    column: str

    def value(self) -> Any:
        return _bytes_or_path(_row_group(self.table, self.group, self.column)[self.row], self.table.parent)


@dataclass(frozen=True)
class DatasetCell:
    """Row `row` of a dataset saved with `save_to_disk`, in a column of pictures or of their paths."""

    folder: Path
    row: int
    column: str

    def value(self) -> Any:
        return _bytes_or_path(open_dataset(self.folder)[self.row][self.column], self.folder)


@dataclass(frozen=True)
class TarCell:
    """The `size` bytes at `offset` of an archive, counted after decompression if it is `compressed` by gzip."""

    archive: Path
    offset: int
    size: int
    compressed: bool = False

    def value(self) -> Any:
        if self.size > _LARGEST:
            raise ValueError(f"{self.size:,} bytes are too many for a picture")
        if self.compressed:
            unzipped = _unzipped(self.archive)  # goes on where the last picture ended
            unzipped.seek(self.offset)
            return self._whole(unzipped.read(self.size))
        with self.archive.open("rb") as file:
            file.seek(self.offset)
            return self._whole(file.read(self.size))

    def _whole(self, data: bytes) -> bytes:
        if len(data) < self.size:
            raise ValueError(f"{self.archive} ends before the end of this picture")
        return data


@dataclass(frozen=True)
class ArrayCell(TarCell):
    """A picture in an array of pixels, uint8 [height, width, 3]."""

    width: int = 0
    height: int = 0

    def value(self) -> Any:
        from PIL import Image

        return Image.frombytes("RGB", (self.width, self.height), super().value())


class Unzipped(gzip.GzipFile):
    """The contents of a .gz. Raises ValueError where an archive in it asks for more than a picture's bytes at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LARGEST:
            raise ValueError(f"{self.name} asks for {size:,} bytes at once")
        return super().read(size)


@lru_cache(maxsize=1)
def _unzipped(archive: Path) -> Unzipped:
    return Unzipped(archive)


class _RowGroup:
    """A column of a row group, read forward. A row before the last one is read from the start again."""

    _first: int
    _rows: Any
    _batches: Iterator[Any]

    def __init__(self, table: Path, group: int, column: str) -> None:
        self._table, self._group, self._column = table, group, column
        self._restart()

    def __getitem__(self, row: int) -> Any:
        if row < self._first:
            self._restart()
        while row >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._rows = next(self._batches)
        return self._rows[row - self._first].as_py()

    def _restart(self) -> None:
        self._first = 0
        self._rows = []
        self._batches = (
            batch.column(0)
            for batch in open_parquet(self._table).iter_batches(
                _ROWS_AT_ONCE, row_groups=[self._group], columns=[self._column], use_threads=False
            )
        )


@lru_cache(maxsize=1)
def _row_group(table: Path, group: int, column: str) -> _RowGroup:
    return _RowGroup(table, group, column)


@lru_cache(maxsize=1)
def open_dataset(folder: Path) -> Any:
    """A dataset saved with `save_to_disk`, whose pictures stay encoded."""
    import datasets

    dataset = datasets.load_from_disk(os.fspath(folder))
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _bytes_or_path(value: Any, folder: Path) -> Any:
    """The picture in a cell: its bytes, or its path in `folder`."""
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    return inside(folder, value) if isinstance(value, str) else value
