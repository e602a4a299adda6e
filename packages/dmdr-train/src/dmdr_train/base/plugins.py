"""Plug-ins: what installed packages add to dmdr through the entry points of their pyproject.toml.

    [project.entry-points.dmdr_objectives]
    my_matching = "my_package:MyMatching"

The built-in parts register in the same way, in the pyproject.toml of dmdr-train.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any


@dataclass(frozen=True)
class Plugins:
    """The plug-ins of one group.

    Args:
        group: the entry-point group, such as "dmdr_objectives".
        noun: what one of them is called in errors, such as "objective".
    """

    group: str
    noun: str

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted({entry.name for entry in _entries(self.group)})

    def load(self, name: str) -> Any:
        """Import what is registered under a name.

        Raises:
            ValueError: the name is unknown, two packages register it, or its module cannot be imported.
        """
        found = {entry.value: entry for entry in _entries(self.group) if entry.name == name}
        if not found:
            raise ValueError(f"unknown {self.noun} {name!r}; {nearest_name(name, self.names())}")
        if len(found) > 1:
            raise ValueError(f"{self.noun} {name!r} is claimed by {' and '.join(sorted(found))}; uninstall one of them")
        (entry,) = found.values()
        try:
            return entry.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self.noun} {name!r} cannot be imported from {entry.value} ({error})") from error


def nearest_name(name: str, valid: Sequence[str], cutoff: float = 0.6) -> str:
    """The hint for a name that is not valid: "did you mean …?", or all valid names if none is near."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}?" if near else f"valid are {', '.join(valid)}"


@cache
def _entries(group: str) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))
