"""The rows of the check, the most valuable first, and their results. This module imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dmdr_rewards.interface.info import BUILT_IN

TINY_SECONDS = 3.0
"""The longest expected duration of a row in the rehearsal."""


class MistakeError(Exception):
    """A user's mistake, as one line."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: the name for `--only`.
        seconds: expected duration on an H100 or H200, including making the weights.
        function: `module:name` of the measuring function, called with a `gpu.measure.Bench` and `options`.
    """

    name: str
    seconds: float
    function: str
    options: dict[str, Any] = field(default_factory=dict)

    def expected(self, tiny: bool) -> float:
        """Return the seconds that must remain in the budget when the row begins."""
        return min(self.seconds, TINY_SECONDS) if tiny else self.seconds


@dataclass
class Measured:
    """The measurements of a row; None for a number that was not measured, for example on a CPU.

    Attributes:
        seconds: per step, the median after one warm-up step.
        peak: the peak of allocated memory in these steps, in GiB.
        flops: floating-point operations of one step, including recomputation in the backward pass.
        waits: how often per step the program waited for the device.
        numbers: values that must be finite, such as losses.
        notes: texts for the table.
        more: further values for the JSON file only.
    """

    batch: int | None = None
    seconds: float | None = None
    peak: float | None = None
    flops: float | None = None
    waits: float | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def not_finite(self) -> list[str]:
        """The names of the values that are not finite, including the measurements."""
        measured = {name: getattr(self, name) for name in ("seconds", "peak", "flops", "waits")}
        found = {**self.numbers, **{name: value for name, value in measured.items() if value is not None}}
        return [name for name, value in found.items() if not math.isfinite(value)]


PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"


@dataclass
class Result:
    """The outcome of a row: passed, failed or left out, and the reason."""

    name: str
    state: str
    reason: str = ""
    took: float = 0.0
    measured: Measured = field(default_factory=Measured)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(name: str, measured: Measured, took: float) -> Result:
    """Return the result of a completed row; a number that is not finite is a failure."""
    if measured.not_finite:
        return Result(name, FAILED, f"not finite: {', '.join(measured.not_finite)}", took, measured)
    return Result(name, PASSED, "", took, measured)


def exit_code(results: Sequence[Result]) -> int:
    """Return 1 if a row has failed, otherwise 0; rows that were left out do not count as failures."""
    return int(any(result.state == FAILED for result in results))


def _training(recipe: str, seconds: float, batch: int, model: str, vae: str | None = None) -> Row:
    return Row(recipe, seconds, "gpu.training:recipe", {"name": recipe, "batch": batch, "model": model, "vae": vae})


def _compiled(row: Row, seconds: float) -> Row:
    """The same steps with `memory.compile`, which compiles for a while first."""
    return _changed(row, "compiled", seconds, changes=["memory.compile=true"])


def _changed(row: Row, suffix: str, seconds: float, **options: Any) -> Row:
    """The same steps with other options of `gpu.training.recipe`, under a longer name."""
    return Row(f"{row.name}-{suffix}", seconds, row.function, {**row.options, **options})


def _reward(name: str, seconds: float) -> Row:
    return Row(f"reward-{name}", seconds, "gpu.rewards:reward", {"name": name})


UNMEASURED = frozenset({"hpsv3", "mps", "vqascore-local", "unified-reward", "ocr-local", "geneval"})
"""Rewards without a row: they need files of a processor or of an engine, which random weights cannot stand for. `mps`
takes little more than `pickscore`."""


def rows() -> list[Row]:
    """Return all rows in the order in which they are measured."""
    cold_start = _training("sd35-large-cold-start", 45, 1, "sd35-large")
    batch_4 = _changed(cold_start, "batch-4", 60, batch=4)
    refl = _training("sd35-large-refl", 46, 1, "sd35-large")
    sdxl = _training("sdxl-1step-80gb", 60, 1, "sdxl-base", "taesdxl")
    sdxl_4 = _changed(sdxl, "batch-4", 60, batch=4)
    found = [
        cold_start,
        Row("demo", 6, "gpu.agreement:demo"),
        Row("resumed", 5, "gpu.agreement:resumed"),
        Row("one-backbone", 5, "gpu.agreement:one_backbone"),
        Row("fp16-overflow", 4, "gpu.agreement:overflow"),
        refl,
        _compiled(cold_start, 45),
        batch_4,
        _training("sdxl-1step-refl", 60, 1, "sdxl-base", "taesdxl"),
        _training("sit-xl-2-cold-start", 18, 64, "sit-xl-2", "sd-vae-ft-ema"),
        _training("sd35-large-24gb", 70, 1, "sd35-large"),
        sdxl,
        sdxl_4,
        _reward("hpsv2.1", 5),
        _reward("dfn-clip", 5),
        _reward("pickscore", 8),
        _reward("imagereward", 5),
        _reward("dinov2", 4),
        _reward("aesthetic", 5),
        _reward("clip", 3),
        _reward("class-label", 3),
        Row("built-in-problems", 60, "gpu.training:built_in_problems"),
        _training("sd3-medium-cold-start", 18, 8, "sd3-medium"),
        _training("sdxl-1step-cold-start", 18, 1, "sdxl-base", "taesdxl"),
        _training("sdxl-regression", 14, 1, "sdxl-base", "taesdxl"),
        _training("sd35-large-srpo", 36, 1, "sd35-large"),
        _training("sd35-large-decoupled", 30, 1, "sd35-large"),
        _training("sd35-large-sub-interval", 30, 1, "sd35-large"),
        _training("sdxl-4step-decoupled", 18, 1, "sdxl-base", "taesdxl"),
        _training("sd3-medium-rtdmd-cold-start", 60, 2, "sd3-medium"),
        _training("sd3-medium-rtdmd", 40, 2, "sd3-medium"),
        _training("sd35-large-48gb", 50, 1, "sd35-large"),
        _compiled(refl, 50),
        _compiled(batch_4, 75),
        _compiled(sdxl_4, 75),
    ]
    missing = {name for name, info in BUILT_IN.items() if not info.endpoint and name not in UNMEASURED} - {
        row.options["name"] for row in found if row.name.startswith("reward-")
    }
    assert not missing, f"rewards without a row: {missing}"
    return found


def select(names: Sequence[str]) -> list[Row]:
    """Return the rows with these names or prefixes; an empty list selects all rows.

    Raises:
        MistakeError: a name matches no row.
    """
    found = rows()
    for name in names:
        if not any(row.name.startswith(name) for row in found):
            raise MistakeError(f"--only {name}: no row has this name or beginning; --list prints the names")
    return [row for row in found if not names or row.name.startswith(tuple(names))]
