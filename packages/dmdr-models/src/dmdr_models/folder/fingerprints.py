"""Digests that name the content of a model's files: equal digests mean equal results. Imports no torch.

A large file is read at evenly spread places only. What is not here, such as a hub name, stands for itself.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dmdr_models.folder.checks import check_part
from dmdr_models.folder.layout import Layout
from dmdr_models.folder.weight_files import is_weights, weight_files


def text_fingerprint(layout: Layout, path: str | Path, max_tokens: int | None) -> str:
    """Name the text encoders of a model folder and the length of their sequence: equal texts give equal embeddings.

    The digest covers all configs, all files of the tokenizers, and the weights' headers, sizes and a sample of their
    bytes.

    Raises:
        FileNotFoundError: an encoder is missing.
        ValueError: one is of another class.
    """
    digest = hashlib.sha256(f"{max_tokens}".encode())
    lacking = layout.lacking(path)
    for part, expected in layout.text_encoders.items():
        if part not in lacking:
            check_part(path, part, expected)
            _add(digest, _in_force(Path(path) / part))
            _add(digest, _files(Path(path) / part.replace("text_encoder", "tokenizer")))
    if not Path(path).is_dir():
        digest.update(str(path).encode())
    return digest.hexdigest()


def network_fingerprint(layout: Layout, path: str | Path) -> str:
    """Name the network of a model folder, by its config and by sizes and a sample of the bytes of its weights.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is of another class.
    """
    check_part(path, layout.network_part, layout.network_classes, quantised=True)
    digest = hashlib.sha256()
    _add(digest, _in_force(Path(path) / layout.network_part))
    if not Path(path).is_dir():
        digest.update(str(path).encode())
    return digest.hexdigest()


def content_fingerprint(path: str | Path) -> str:
    """Name the content of a file, or of the files of a folder that are not hidden: names, sizes, a sample of bytes."""
    place, digest = Path(path), hashlib.sha256()
    if place.is_file():
        digest.update(_sample(place))
    elif place.is_dir():
        names = {str(file.relative_to(place)): file for file in place.rglob("[!.]*") if file.is_file()}
        for name in sorted(name for name in names if "/." not in f"/{name}"):
            digest.update(name.encode(errors="surrogateescape"))
            digest.update(_sample(names[name]))
    else:
        digest.update(str(path).encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("[!.]*") if file.is_file())


def _in_force(folder: Path) -> list[Path]:
    """The files of a part without weights that are not read, such as those of another variant."""
    read = set(weight_files(folder).files) if folder.is_dir() else set()
    return [file for file in _files(folder) if file in read or not is_weights(file)]


def _add(digest: Any, files: Iterable[Path]) -> None:
    for file in files:
        digest.update(file.name.encode())
        digest.update(_sample(file))


def _sample(file: Path, pieces: int = 64, length: int = 1 << 16) -> bytes:
    """A small file's bytes; of a large one its size and evenly spread pieces, the header's first."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= pieces * length:
            return stream.read()
        found = [str(size).encode()]
        for i in range(pieces):
            stream.seek(i * (size - length) // (pieces - 1))
            found.append(stream.read(length))
        return b"".join(found)
