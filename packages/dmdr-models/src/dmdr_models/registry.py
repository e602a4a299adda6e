"""Model families by name. A family is an entry point `name = "module:LAYOUT"`, built in or of an installed package.

A package adds one by declaring it in the group `dmdr_families` of its pyproject.toml:

    [project.entry-points.dmdr_families]
    dots = "my_package.layout:LAYOUT"

The object is a `dmdr_models.folder.layout.Layout`. Nothing here imports torch until a model is loaded.
"""

import difflib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models.base.json_files import read_json
from dmdr_models.folder.layout import Layout

if TYPE_CHECKING:
    from dmdr_models.families.protocols import Family

GROUP = "dmdr_families"


def names() -> list[str]:
    """The names that `find` and `load` know, sorted: the built-in families and those of installed packages."""
    return sorted({entry.name for entry in _entries()})


def nearest(name: str) -> str:
    """The known name that is most like another."""
    return difflib.get_close_matches(name, names(), n=1, cutoff=0.0)[0]


def find(name: str) -> Layout:
    """The layout of the family called `name`.

    Raises:
        ValueError: the name is unknown, two packages claim it, or its package is broken.
    """
    found = {entry.value: entry for entry in _entries() if entry.name == name}
    if not found:
        known = ", ".join(names())
        raise ValueError(f"unknown model family {name!r}; did you mean {nearest(str(name))}? Valid are {known}")
    if len(found) > 1:
        raise ValueError(f"model family {name!r} is claimed by {' and '.join(sorted(found))}: uninstall one of them")
    entry = next(iter(found.values()))
    try:
        layout = entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model family {name!r}: {entry.value} cannot be imported: {error}") from error
    if not isinstance(layout, Layout) or layout.name != name:
        raise ValueError(f"model family {name!r}: {entry.value} is not a Layout with that name")
    return layout


def layouts() -> list[Layout]:
    """The layouts of all families, without those that `find` refuses."""
    found = []
    for name in names():
        try:
            found.append(find(name))
        except ValueError:
            continue
    return found


def recognise(folder: Path) -> Layout | None:
    """The family of a local model folder, by the class that the config of its network names; None if it is unknown."""
    for layout in layouts():
        try:
            kind = read_json(folder / layout.network_part / "config.json")["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if kind in layout.network_classes:
            return layout
    return None


def load(family: str, path: str | Path, **options: Any) -> "Family":
    """Open a model folder (or hub name) of the given family; `load_network` reads the networks later.

    Args:
        options: `vae`, folder or hub name of another VAE; `dtype` of everything that is loaded (default: float32); of
            text-to-image families also `resolution` in pixels, a side or (height, width), and `max_tokens`. An option
            that is None is not given.

    Raises:
        ValueError: no such family, the folder holds another model, or the family cannot take an option.
        FileNotFoundError: a file of the model is missing.
    """
    return find(family).open(path, **options)


def _entries() -> list[EntryPoint]:
    return list(entry_points(group=GROUP))
