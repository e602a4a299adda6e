"""The names of the files below a folder, or that match a glob."""

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path


def below(root: Path) -> list[str]:
    """The files in a folder and in its subfolders, relative to it, sorted; names that begin with a dot are left out.

    Links to folders are followed. A folder that is reached again, through a link to a parent folder or a second link,
    is left out, so a file counts once.
    """
    seen: set[tuple[int, int]] = set()
    names: list[str] = []
    starts = [os.fspath(root)]
    for start in starts:  # a folder itself comes before the links to it: these are appended while the list is read
        for folder, folders, files in os.walk(start):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths = [os.path.join(folder, name) for name in folders]
            starts.extend(path for path in paths if os.path.islink(path))  # os.walk does not follow these
            names.extend(os.path.join(folder, name) for name in files if not name.startswith("."))
    return sorted(os.path.relpath(name, root) for name in names)


def matching(pattern: Path, root: Path) -> list[str]:
    """The files that match a glob, relative to `root`, sorted. `**` stands for any number of folders, as in `below`."""
    parts = pattern.relative_to(root).parts
    if "**" not in parts:
        return sorted(glob.glob(os.path.join(*parts), root_dir=root))
    return [name for name in below(root) if _fits(Path(name).parts, parts)]


def until_wildcard(pattern: Path) -> Path:
    """The folder that a glob names before its first wildcard."""
    plain: list[str] = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return Path(*plain)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
