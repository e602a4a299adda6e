"""How a run stands: stage, step, time left, the last values and their trends. Only numbers that are on the CPU."""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence

from dmdr_train.recipe.schema import Recipe

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 32
"""Characters of a trend, at most."""
TIMED = 50
"""Steps that the time left is estimated from."""
SHOWN = ("loss/", "reward/", "watch/trained/", "watch/held_out/", "watch/diversity", "memory")
"""How the names of the values begin that a terminal shows."""


class Trend:
    """The values of a whole run in at most `2 · WIDTH` numbers; where there are more, each is a mean of neighbours."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.last = math.nan
        self._each = 1
        self._waiting: list[float] = []

    def add(self, value: float) -> None:
        """Add the next value; one that is not finite is the last, and not in the trend."""
        self.last = value
        if not math.isfinite(value):
            return
        self._waiting.append(value)
        if len(self._waiting) < self._each:
            return
        self.means.append(sum(self._waiting) / self._each)
        self._waiting = []
        if len(self.means) == 2 * WIDTH:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self._each *= 2

    def line(self) -> str:
        """The trend as a line of blocks, lowest to highest; empty where there are fewer than two values."""
        return sparkline(list(self.means))  # a copy, since a thread draws it while the run goes on


def sparkline(values: Sequence[float]) -> str:
    """Blocks of a height that grows with the value, one per number; at most `WIDTH`, then each is of two numbers.

    Args:
        values: finite numbers.
    """
    if len(values) > WIDTH:
        values = [sum(pair) / len(pair) for pair in (values[i : i + 2] for i in range(0, len(values), 2))]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((value - low) / (high - low) * top) if high > low else top // 2] for value in values)


class Progress:
    """How a run stands.

    Args:
        start: the step that the run starts from.
        rows: that were logged before.

    Attributes:
        trends: by name, of the values that `SHOWN` begins.
        teacher: the values of early warning of the teacher's pictures.
        warnings: the last three, the newest at the end.
    """

    def __init__(self, settings: Recipe, start: int, rows: Sequence[Mapping[str, float]] = ()):
        self.stages, self.steps = settings.stages, settings.run.steps
        self.step = start
        self.trends: dict[str, Trend] = {}
        self.teacher: dict[str, float] = {}
        self.warnings: deque[str] = deque(maxlen=3)
        self.clock = deque([time.monotonic()], maxlen=TIMED + 1)
        for row in rows:
            self.log(row)

    def advance(self) -> None:
        """Count a step."""
        self.step += 1
        self.clock.append(time.monotonic())

    def log(self, values: Mapping[str, float]) -> None:
        """Take the values of a step."""
        for name, value in values.items():
            if name.startswith(SHOWN):
                self.trends.setdefault(name, Trend()).add(value)
            elif name.startswith("watch/teacher/"):
                self.teacher[name.replace("teacher/", "", 1)] = value

    @property
    def stage(self) -> str:
        """The stage of the step."""
        names = [name for name, end in self.stages.items() if self.step <= end]
        return (names[0] if names else list(self.stages)[-1]).replace("_", " ")

    @property
    def seconds_per_step(self) -> float:
        """The mean over the last steps, with the samples and checks between them; NaN before the first."""
        steps = len(self.clock) - 1
        return (self.clock[-1] - self.clock[0]) / steps if steps else math.nan

    @property
    def pace(self) -> str:
        """The seconds per step and the time left, in words; empty before the first step."""
        each = self.seconds_per_step
        return f"{each:.3g} s per step, {duration(each * (self.steps - self.step))} left" if each == each else ""

    def shown(self) -> list[tuple[str, str, str]]:
        """Name, last value and trend of what is shown, losses first."""
        order = sorted(self.trends, key=lambda name: next(i for i, each in enumerate(SHOWN) if name.startswith(each)))
        return [(short_name(name), self._value(name), self.trends[name].line()) for name in order]

    def _value(self, name: str) -> str:
        text = f"{self.trends[name].last:.3g}" + (" GiB" if name == "memory" else "")
        return f"{text} (teacher {self.teacher[name]:.3g})" if name in self.teacher else text


def short_name(name: str) -> str:
    """A logged name as a terminal shows it, such as "held out pickscore" for "watch/held_out/pickscore"."""
    kind, _, rest = name.removeprefix("watch/").partition("/")
    return f"{kind.replace('_', ' ')} {rest}".strip()


def duration(seconds: float) -> str:
    """A time in its two largest units: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
