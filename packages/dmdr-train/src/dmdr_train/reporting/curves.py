"""curves.png: the logged values of a run over its steps, with the teacher's values and the limits of the rules.

A panel's scale is that of most of its points: single outliers leave it. It is logarithmic where positive values span
decades. Values that never change have no panel.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.monitoring import rules
from dmdr_train.recipe import schema
from dmdr_train.tracking.metrics_file import read_metrics

BLUE, GREY, RED = "#0072b2", "#595959", "#b2182b"
"""Colours of the run, the teacher and the limits; they differ for the colour-blind, and in grey."""
FORMS = {"teacher": (GREY, "--"), "limit": (RED, "-.")}
SMOOTHED = 60
"""Points from which on a panel has their running median, and the points themselves in pale."""
FEW = 20
"""Points up to which each of them has a dot, and none of them is an outlier."""
DECADES = 2.0
"""Powers of ten that positive values must span for a logarithmic scale."""

Points = list[tuple[float, float]]
"""Steps and values."""


@dataclass
class Panel:
    """What one panel shows.

    Attributes:
        points: of the run, finite.
        lines: points of the "teacher" and of each "limit".
    """

    name: str
    points: Points
    lines: list[tuple[str, Points]] = field(default_factory=list)


def draw_curves(folder: Path, settings: schema.Recipe) -> None:
    """Draw the losses, rewards and measures of early warning over the steps, with the ends of the stages marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = panels(read_metrics(folder), settings)
    if not shown:
        return
    wide = min(4, len(shown))
    tall = -(-len(shown) // wide)
    figure, axes = plt.subplots(tall, wide, figsize=(4.2 * wide, 3 * tall), layout="constrained", squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, shown, strict=False):
        draw_panel(axis, panel, settings)
    marks = [axis.get_legend_handles_labels() for axis in axes.flat]
    legend = {label: handle for handles, labels in marks for handle, label in zip(handles, labels, strict=True)}
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend))
    write_whole(folder / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))
    plt.close(figure)


def panels(rows: Sequence[rules.Row], settings: schema.Recipe) -> list[Panel]:
    """The panels: losses, rewards, the teacher's strength, then the measures of early warning."""
    kinds = ("loss/", "reward/", "teacher_scale", "weight/")
    watched = [f"{rules.PREFIX}{name}" for name in settings.watched if not name.startswith(("teacher/", "grad_norm/"))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [*(n for kind in kinds for n in names if n.startswith(kind)), *(n for n in watched if n in names)]
    found = [Panel(name, points_of(rows, name), list(lines_of(rows, settings, name))) for name in names]
    return [panel for panel in found if len({value for _, value in panel.points}) > 1]


def points_of(rows: Sequence[rules.Row], name: str) -> Points:
    """The finite values of a name over the steps."""
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def lines_of(rows: Sequence[rules.Row], settings: schema.Recipe, name: str) -> Iterator[tuple[str, Points]]:
    """The teacher's line of a measure, and the limits that rules set it."""
    metric = name.removeprefix(rules.PREFIX)
    if metric == name:
        return
    teacher = points_of(rows, f"{rules.PREFIX}teacher/{metric}")
    if teacher:
        yield "teacher", teacher
    for rule in settings.rules:
        if isinstance(rule, schema.Limit) and rule.metric == metric:
            counted = [(step, value) for step, value in points_of(rows, name) if step > (rule.start or 0)]
            bound = rule.above if rule.above is not None else rule.below
            assert bound is not None
            whole = {step: 1.0 for step, _ in counted}
            if rule.relative_to is not None:
                whole = dict(teacher) if rule.relative_to == "teacher" else {step: counted[0][1] for step, _ in counted}
            limit = [(step, bound * whole[step]) for step, _ in counted if whole.get(step, 0.0) > 0]
            if limit:
                yield "limit", limit


def draw_panel(axis: Any, panel: Panel, settings: schema.Recipe) -> None:
    """Draw a panel: the run's values, the teacher's and the limits, and the ends of the stages."""
    steps, values = zip(*panel.points, strict=True)
    smooth, marker = running_median(values), "." if len(steps) < FEW else None
    axis.plot(steps, values, color=BLUE, alpha=0.3 if smooth else 1.0, linewidth=1.2, marker=marker)
    if smooth:
        axis.plot(steps, smooth, color=BLUE, linewidth=1.6)
    logarithmic, low, high = scale(panel)
    for kind, line in panel.lines:
        if any(low <= value <= high for _, value in line):
            colour, form = FORMS[kind]
            axis.plot(*zip(*line, strict=True), color=colour, linestyle=form, linewidth=1.2, label=kind)
    for end in list(settings.stages.values())[:-1]:
        axis.axvline(end, color="black", linestyle=":", linewidth=1.0, label="end of a stage")
    axis.set(title=panel.name, xlabel="step", xlim=(0, settings.run.steps))
    axis.set_yscale("log" if logarithmic else "linear")
    axis.set_ylim(low, high)
    axis.grid(alpha=0.3)


def running_median(values: Sequence[float]) -> list[float]:
    """The median of each value and its neighbours, a twentieth of all; empty where there are few values."""
    if len(values) < SMOOTHED:
        return []
    reach = max(1, len(values) // 40)
    return [median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def scale(panel: Panel) -> tuple[bool, float, float]:
    """Whether the scale is logarithmic, its lower and its upper end.

    It has the middle 98 % of the values, what lies further out by at most half of their range, the teacher's line, and
    a limit that is near. It spans at least a tenth of the largest value, so that noise does not fill a panel.
    """
    values = sorted(value for _, value in panel.points)
    cut = math.ceil(len(values) / 100) if len(values) >= FEW else 0
    inner = values[cut : len(values) - cut]
    logarithmic = values[0] > 0 and math.log10(inner[-1] / inner[0]) >= DECADES
    forth, back = (math.log10, lambda x: 10.0**x) if logarithmic else (float, float)
    low, high = forth(inner[0]), forth(inner[-1])
    reach = (high - low) / 2
    lines = {"teacher": [inner[0]], "limit": [inner[0]]}
    for kind, line in panel.lines:
        lines[kind] += [value for _, value in line if value > 0 or not logarithmic]
    seen = [x for x in map(forth, (values[0], values[-1])) if low - reach <= x <= high + reach]
    seen += map(forth, lines["teacher"])
    low, high = min([low, *seen]), max([high, *seen])
    least = 0.0 if logarithmic else 0.1 * max(abs(low), abs(high)) or 1.0
    lacking = max(0.0, least - (high - low)) / 2
    low, high = low - lacking, high + lacking
    size = high - low
    seen = [x for x in map(forth, lines["limit"]) if low - size <= x <= high + size]
    low, high = min([low, *seen]), max([high, *seen])
    border = 0.06 * (high - low)
    return logarithmic, back(low - border), back(high + border)
