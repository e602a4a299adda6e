"""Archives of pictures in webdataset's layout: `.tar` files in which the files of one sample share a name.

    00000.jpg   the picture
    00000.txt   its prompt
    00000.json  an object with its prompt in `prompt`, `caption` or `text`, and its `label`
    00000.cls   its class label

Nothing is unpacked to the disk: a picture is read from its place in the archive.
"""

import posixpath
import tarfile
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dmdr_rewards.base.safe_reading import from_json
from dmdr_rewards.score.cells import TarCell

_LONGEST_TEXT = 1 << 20  # bytes


def from_tar(path: Path, endings: Collection[str]) -> list[tuple[str, TarCell, dict[str, Any]]]:
    """The name, the place, and the row of prompt and label of each picture, in the order of the archive.

    endings  of pictures, such as ".png"

    Links, devices and names that begin with a dot are left out. Raises ValueError for a text that is too long or no
    UTF-8, and any error of tarfile for a damaged archive.
    """
    pictures: list[tuple[str, str, TarCell]] = []
    rows: dict[str, dict[str, Any]] = defaultdict(dict)
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            name = posixpath.basename(member.name)
            if not member.isreg() or member.issparse() or name.startswith("."):
                continue
            if member.size < 0:
                raise ValueError(f"{path}, {member.name}: the size is {member.size}")
            stem, _, ending = name.partition(".")
            sample = posixpath.join(posixpath.dirname(member.name), stem)
            if f".{ending.lower()}" in endings:
                pictures.append((sample, member.name, TarCell(path, member.offset_data, member.size)))
            elif ending in ("txt", "json", "cls"):
                rows[sample].update(_row(ending, _text(archive, member, path), f"{path}, {member.name}"))
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
