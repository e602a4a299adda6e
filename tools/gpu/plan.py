"""The rows of the check, the most valuable first, and their results. Imported without torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dmdr_rewards.interface.info import BUILT_IN

TINY_SECONDS = 3.0
"""What any row of the rehearsal may be expected to take."""


class MistakeError(Exception):
    """A mistake of the user's, as one line."""


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: by which `--only` asks for it.
        seconds: that it may be expected to take on an H100, the making of its weights included.
        function: `module:name` of what measures it, called with a `gpu.measure.Bench` and `options`.
    """

    name: str
    seconds: float
    function: str
    options: dict[str, Any] = field(default_factory=dict)

    def expected(self, tiny: bool) -> float:
        """Seconds that the budget must still hold when the row begins."""
        return min(self.seconds, TINY_SECONDS) if tiny else self.seconds


@dataclass
class Measured:
    """What a row's function found; None where there is nothing to say, as on a CPU.

    Attributes:
        seconds: per step, the median after one step of warm-up.
        peak: of the memory that was allocated in these steps, in GiB.
        flops: floating-point operations of one step, what is recomputed in the backward pass included.
        waits: times per step that the program waited for the device.
        numbers: that must be finite, such as losses.
        notes: for the table.
        more: for the JSON alone.
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
        """The names of the numbers that are not, measured ones included."""
        measured = {name: getattr(self, name) for name in ("seconds", "peak", "flops", "waits")}
        found = {**self.numbers, **{name: value for name, value in measured.items() if value is not None}}
        return [name for name, value in found.items() if not math.isfinite(value)]


PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"


@dataclass
class Result:
    """A row with its end: passed, failed or left out, and why."""

    name: str
    state: str
    reason: str = ""
    took: float = 0.0
    measured: Measured = field(default_factory=Measured)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judged(name: str, measured: Measured, took: float) -> Result:
    """The result of a row that came to its end: a number that is not finite is a failure."""
    if measured.not_finite:
        return Result(name, FAILED, f"not finite: {', '.join(measured.not_finite)}", took, measured)
    return Result(name, PASSED, "", took, measured)


def exit_code(results: Sequence[Result]) -> int:
    """1 where a row has failed, otherwise 0; rows that were left out are no failure."""
    return int(any(result.state == FAILED for result in results))


def _training(recipe: str, seconds: float, batch: int, model: str, vae: str | None = None) -> Row:
    return Row(recipe, seconds, "gpu.training:recipe", {"name": recipe, "batch": batch, "model": model, "vae": vae})


def _reward(name: str, seconds: float) -> Row:
    return Row(f"reward-{name}", seconds, "gpu.rewards:reward", {"name": name})


def rows() -> list[Row]:
    """All of them, in the order in which they are carried out."""
    found = [
        _training("sd35-large-cold-start", 30, 1, "sd35-large"),
        Row("demo", 6, "gpu.agreement:demo"),
        Row("resumed", 5, "gpu.agreement:resumed"),
        Row("one-backbone", 5, "gpu.agreement:one_backbone"),
        Row("fp16-overflow", 4, "gpu.agreement:overflow"),
        _training("sd35-large-refl", 42, 1, "sd35-large"),
        _training("sdxl-1step-refl", 26, 1, "sdxl-base", "taesdxl"),
        _training("sit-xl-2-cold-start", 12, 64, "sit-xl-2", "sd-vae-ft-ema"),
        _reward("hpsv2.1", 5),
        _reward("dfn-clip", 5),
        _reward("pickscore", 8),
        _reward("imagereward", 5),
        _reward("dinov2", 4),
        _reward("aesthetic", 5),
        _reward("clip", 3),
        _reward("class-label", 3),
        _training("sd3-medium-cold-start", 18, 8, "sd3-medium"),
        _training("sdxl-1step-cold-start", 18, 1, "sdxl-base", "taesdxl"),
        _training("sdxl-regression", 14, 1, "sdxl-base", "taesdxl"),
        _training("sd35-large-srpo", 36, 1, "sd35-large"),
    ]
    missing = {name for name, info in BUILT_IN.items() if not info.endpoint} - {
        row.options["name"] for row in found if row.name.startswith("reward-")
    }
    assert not missing, f"rewards without a row: {missing}"
    return found


def select(names: Sequence[str]) -> list[Row]:
    """The rows with these names or prefixes; all of them for none.

    Raises:
        MistakeError: a name fits no row.
    """
    found = rows()
    for name in names:
        if not any(row.name.startswith(name) for row in found):
            raise MistakeError(f"--only {name}: no row begins so; --list prints them")
    return [row for row in found if not names or row.name.startswith(tuple(names))]
