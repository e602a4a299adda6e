"""Archives of pictures: `.tar` and `.tar.gz` in webdataset's layout, and `.npz` in that of ADM.

The files of one sample share a name:

    00000.jpg   the picture
    00000.txt   its prompt
    00000.json  an object with its prompt in `prompt`, `caption` or `text`, and its `label`
    00000.cls   its class label

An .npz holds its pictures in one array, as ADM's program samples and its reference batches for ImageNet do:

    arr_0   uint8 [N, H, W, 3]
    arr_1   integers [N], their class labels, if it is there

Nothing is unpacked to the disk: a picture is read from its place in the archive. A .tar.gz has no places, so each
process reads it from the start; it takes as long as unpacking it once.
"""

import posixpath
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dmdr_rewards.base.safe_reading import from_json
from dmdr_rewards.score.cells import ArrayCell, TarCell, Unzipped

PICTURES, LABELS = "arr_0", "arr_1"
"""The arrays of an .npz."""
_LONGEST_TEXT = 1 << 20  # bytes


def from_tar(path: Path, endings: Collection[str]) -> list[tuple[str, TarCell, dict[str, Any]]]:
    """The name, the place, and the row of prompt and label of each picture, in the order of the archive.

    endings  of pictures, such as ".png"

    Links, devices and names that begin with a dot are left out. Raises ValueError for a text that is too long or no
    UTF-8 and for an archive without its end, and any error of tarfile for a damaged archive.
    """
    compressed = path.suffix.lower() != ".tar"
    pictures: list[tuple[str, str, TarCell]] = []
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    with (
        (Unzipped if compressed else open)(path, "rb") as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        for member in archive:
            name = posixpath.basename(member.name)
            if not member.isreg() or member.issparse() or name.startswith("."):
                continue
            if member.size < 0:
                raise ValueError(f"{path}, {member.name}: the size is {member.size}")
            stem, _, ending = name.partition(".")
            sample = posixpath.join(posixpath.dirname(member.name), stem)
            if f".{ending.lower()}" in endings:
                pictures.append((sample, member.name, TarCell(path, member.offset_data, member.size, compressed)))
            elif ending in ("txt", "json", "cls"):
                rows[sample].update(_row(ending, _text(archive, member, path), f"{path}, {member.name}"))
        file.seek(archive.offset)  # where no further member was found
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(
                f"{path} has no end after {len(pictures)} pictures: it is cut off or damaged; fetch it again"
            )
    return [(name, cell, {"file_name": name, **rows[sample]}) for sample, name, cell in pictures]


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> str:
    if member.size > _LONGEST_TEXT:
        raise ValueError(f"{path}, {member.name}: {member.size} bytes are too long for a prompt")
    file = archive.extractfile(member)
    assert file is not None  # a regular file has contents
    try:
        return file.read().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, {member.name} is not UTF-8 ({error.reason})") from None


def _row(ending: str, text: str, where: str) -> dict[str, Any]:
    if ending != "json":
        return {"prompt" if ending == "txt" else "label": text}
    try:
        row = from_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: give one object with `prompt` or `label`")
    return {name: row[name] for name in ("prompt", "caption", "text", "label") if row.get(name) is not None}


def arrays_in(path: Path) -> set[str]:
    """The names of the arrays in an .npz. Raises ValueError or OSError for a file that is missing or no .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no .npz: {error}") from error


def from_npz(path: Path) -> list[tuple[str, ArrayCell, dict[str, Any]]]:
    """The number, the place, and the row of the label of each picture, in the order of the array.

    Raises ValueError for a file without `arr_0`, one with another dtype or shape, and one that is compressed.
    """
    import numpy as np

    held = arrays_in(path)
    if PICTURES not in held:
        raise ValueError(f"{path} has no array {PICTURES}, only {', '.join(sorted(held)) or 'nothing'}: give pictures")
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.getinfo(f"{PICTURES}.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{path}: {PICTURES} is compressed, so no picture has a place: write it with numpy.savez")
        file.seek(entry.header_offset + 26)  # the lengths of the name and of what follows it, see PKWARE's APPNOTE
        lengths = file.read(4)
        file.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(file)
        start = file.tell()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or columns_first:
        raise ValueError(f"{path}: {PICTURES} is {dtype} {list(shape)}: give uint8 [N, H, W, 3], the last axis fastest")
    count, height, width, _ = shape
    size = 3 * height * width
    labels = _labels(path, count) if LABELS in held else None
    return [
        (
            f"{number:06d}",
            ArrayCell(path, start + number * size, size, width=width, height=height),
            {} if labels is None else {"label": labels[number]},
        )
        for number in range(count)
    ]


def _labels(path: Path, count: int) -> list[int]:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        labels = arrays[LABELS]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: {LABELS} is {labels.dtype} {list(labels.shape)}: give an integer for each picture")
    return labels.tolist()
