"""Rewards by name. A reward is an entry point `name = "module:factory"`, built-in or from an installed package.

A package adds one by declaring it in the group `dmdr_rewards` of its pyproject.toml:

    [project.entry-points.dmdr_rewards]
    sharpness = "my_package:Sharpness"

The factory is called as `factory(checkpoint=…, device=…, dtype=…, **options)`, without `checkpoint` if the caller gave
none, and returns a `Reward`. `describe` returns the factory's attribute `info`; for a built-in reward, its entry in
`dmdr_rewards.interface.info.BUILT_IN`.
"""

import difflib
import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from dmdr_rewards.base.errors import MissingError
from dmdr_rewards.interface.info import BUILT_IN, RewardInfo

if TYPE_CHECKING:
    import torch

    from dmdr_rewards.interface.reward import Reward

GROUP = "dmdr_rewards"

_BUILT_IN = (
    EntryPoint("aesthetic", "dmdr_rewards.models.aesthetic:reward", GROUP),
    EntryPoint("class-label", "dmdr_rewards.models.class_label:from_folder", GROUP),
    EntryPoint("clip", "dmdr_rewards.models.clip:clip", GROUP),
    EntryPoint("dfn-clip", "dmdr_rewards.models.clip:dfn_clip", GROUP),
    EntryPoint("dinov2", "dmdr_rewards.models.dinov2:reward", GROUP),
    EntryPoint("geneval", "dmdr_rewards.judges.geneval:GenEval", GROUP),
    EntryPoint("hpsv2.1", "dmdr_rewards.models.hpsv2:reward", GROUP),
    EntryPoint("hpsv3", "dmdr_rewards.models.hpsv3:reward", GROUP),
    EntryPoint("imagereward", "dmdr_rewards.models.imagereward:reward", GROUP),
    EntryPoint("mps", "dmdr_rewards.models.mps:reward", GROUP),
    EntryPoint("ocr", "dmdr_rewards.judges.judge:OCR", GROUP),
    EntryPoint("ocr-local", "dmdr_rewards.judges.ocr:LocalOCR", GROUP),
    EntryPoint("pickscore", "dmdr_rewards.models.pickscore:reward", GROUP),
    EntryPoint("unified-reward", "dmdr_rewards.judges.local:UnifiedReward", GROUP),
    EntryPoint("vlm-judge", "dmdr_rewards.judges.judge:Rating", GROUP),
    EntryPoint("vqascore", "dmdr_rewards.judges.judge:VQAScore", GROUP),
    EntryPoint("vqascore-local", "dmdr_rewards.models.vqascore:VQAScore", GROUP),
)


def available() -> list[str]:
    """The names that `create` accepts, sorted: the built-in rewards and those of installed packages."""
    return sorted({entry.name for entry in _entries()})


def create(
    name: str,
    checkpoint: str | PathLike[str] | None = None,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
    preprocess: Literal["reference", "dmdr"] | None = None,
    **options: Any,
) -> "Reward":
    """Load the reward called `name`.

    checkpoint  local file or folder, in the format that the reward's docstring describes
    device      device of the weights and the scores
    dtype       precision of the networks, default float32; bfloat16 and float16 use autocast, float64 does not
    preprocess  "reference", the default of the built-in rewards, preprocesses as the official implementation does;
                "dmdr" squashes pictures for every reward, as DMDR's authors do
    options     further options of this reward, see its docstring

    Raises ValueError for an unknown name, a name that two packages claim, an option that the reward does not have, and
    a checkpoint that the reward cannot use; its subclass MissingError for files that are not there, with the command
    that fetches the official ones.
    """
    import torch

    factory = _find(name).load()
    arguments: dict[str, Any] = {"device": device, "dtype": torch.float32 if dtype is None else dtype, **options}
    arguments |= {"checkpoint": checkpoint} if checkpoint is not None else {}
    arguments |= {"preprocess": preprocess} if preprocess is not None else {}
    try:
        _check_arguments(name, factory, arguments)
        return factory(**arguments)
    except MissingError as error:
        fetch = BUILT_IN[name].fetch if name in BUILT_IN else ""
        raise MissingError(f"{error}; the official weights: {fetch}" if fetch else str(error)) from error


def describe(name: str) -> RewardInfo:
    """Describe the reward called `name`, without loading a checkpoint.

    Raises ValueError for an unknown name, and for a third party's factory without an attribute `info`.
    """
    entry = _find(name)
    if entry in _BUILT_IN:
        return BUILT_IN[name]
    factory = entry.load()
    info = getattr(factory, "info", None)
    if not isinstance(info, RewardInfo):
        raise ValueError(
            f"reward {name!r} has no description: its factory {factory} needs an attribute info, a RewardInfo"
        )
    return info


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
        if "preprocess" in arguments and "preprocess" not in signature.parameters:
            raise ValueError(f"reward {name!r} has one preprocessing, its model's own: leave preprocess out") from None
        kind = MissingError if "checkpoint" in signature.parameters and "checkpoint" not in arguments else ValueError
        raise kind(f"reward {name!r}: {error}; it takes {', '.join(signature.parameters)}") from None
