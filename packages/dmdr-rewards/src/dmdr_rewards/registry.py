"""Rewards by name. A reward is an entry point `name = "module:factory"`, built in or of an installed package.

A package adds one by declaring it in the group `dmdr_rewards` of its pyproject.toml:

    [project.entry-points.dmdr_rewards]
    sharpness = "my_package:Sharpness"

The factory is called as `factory(checkpoint=…, device=…, dtype=…, **options)`, without `checkpoint` where the caller
gave none, and returns a `Reward`.
"""

import difflib
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from os import PathLike
from typing import Any

import torch

from dmdr_rewards.reward import Reward

GROUP = "dmdr_rewards"

_BUILT_IN = (
    EntryPoint("class-label", "dmdr_rewards.class_label:from_folder", GROUP),
    EntryPoint("dinov2", "dmdr_rewards.dinov2:reward", GROUP),
)


def available() -> list[str]:
    """Names that `create` knows, sorted: the built-in rewards and those of installed packages."""
    return sorted({entry.name for entry in _entries()})


def create(
    name: str,
    checkpoint: str | PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Reward:
    """Load the reward called `name`.

    checkpoint  local file or folder, in the format the reward's own docstring describes
    device      where the weights live and the scores are computed
    dtype       precision of the networks: bfloat16 and float16 run them under autocast, float64 throughout
    options     the reward's own, see its docstring

    Raises ValueError for an unknown name, for a name that two packages claim, for a missing checkpoint, and for an
    option that the reward does not have; the reward raises ValueError for a checkpoint it cannot use.
    """
    factory = _find(name).load()
    arguments: dict[str, Any] = {"device": device, "dtype": dtype, **options}
    if checkpoint is not None:
        arguments["checkpoint"] = checkpoint
    _check_arguments(name, factory, arguments)
    return factory(**arguments)


def _entries() -> list[EntryPoint]:
    return [*_BUILT_IN, *entry_points(group=GROUP)]


def _find(name: str) -> EntryPoint:
    found = {entry.value: entry for entry in _entries() if entry.name == name}
    if not found:
        names = available()
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown reward {name!r}: did you mean {nearest!r}? Available: {', '.join(names)}")
    if len(found) > 1:
        raise ValueError(f"reward {name!r} is claimed by {' and '.join(sorted(found))}: uninstall one of them")
    return next(iter(found.values()))


def _check_arguments(name: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> None:
    signature = inspect.signature(factory)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"reward {name!r}: {error}; it takes {', '.join(signature.parameters)}") from None
