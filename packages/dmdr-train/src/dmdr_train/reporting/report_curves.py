"""The curves of the report: logged values over steps, laid out for an inline SVG. Imports no drawing library."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dmdr_train.monitoring import rules
from dmdr_train.recipe.schema import Limit, Recipe

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 220, 72, 10, 10, 26
"""The SVG's own units: the size of a chart, and its margins."""
MOST_POINTS = 300
"""Points in a line, at most; of more, neighbours are averaged."""
GROUPS = {
    "Early warning": rules.PREFIX,
    "Rewards": "reward/",
    "Losses": "loss/",
}
Point = tuple[float, float]
Place = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """One run's values: `points` are steps and values, `path` is the same in the units of the SVG."""

    run: int
    points: list[Point]
    path: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with everything its SVG needs.

    Attributes:
        levels: horizontal lines, as (kind, text, y): the teacher's value, and the limits of rules.
        ends: vertical lines, as (name of the stage, x).
        ticks_x, ticks_y: (text, place).
    """

    name: str
    group: str
    lines: list[Line]
    levels: list[tuple[str, str, float]]
    ends: list[tuple[str, float]]
    ticks_x: list[tuple[str, float]]
    ticks_y: list[tuple[str, float]]
    steps: int
    logarithmic: bool
    notes: list[str] = field(default_factory=list)


def charts(runs: Sequence[tuple[Recipe, Sequence[rules.Row]]]) -> list[Chart]:
    """The charts of one or more runs, by group. A name whose values never change has no chart.

    Args:
        runs: recipe and logged rows of each; stages, rules and the teacher are those of the first.
    """
    found = []
    for group, prefix in GROUPS.items():
        names = dict.fromkeys(name for _, rows in runs for row in rows for name in row if name.startswith(prefix))
        for name in names:
            if name.startswith(f"{rules.PREFIX}teacher/"):
                continue
            lines = [Line(number, thinned(values_of(rows, name))) for number, (_, rows) in enumerate(runs)]
            lines = [line for line in lines if line.points]
            if len({value for line in lines for _, value in line.points}) > 1:
                found.append(_chart(name.removeprefix(rules.PREFIX), group, lines, runs))
    return found


def values_of(rows: Sequence[rules.Row], name: str) -> list[Point]:
    """The finite values of a name, each with its step."""
    return [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points: the means of equally many neighbours each."""
    size = -(-len(points) // MOST_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def levels_of(name: str, settings: Recipe, rows: Sequence[rules.Row]) -> list[tuple[str, str, float]]:
    """The teacher's value of a watched name, and the limits that rules set for it, as (kind, text, value)."""
    found = rules.evaluations(rows)
    teacher = next((row[f"teacher/{name}"] for row in reversed(found) if f"teacher/{name}" in row), None)
    levels = [] if teacher is None else [("teacher", f"teacher {number(teacher)}", teacher)]
    for rule in settings.rules:
        if not isinstance(rule, Limit) or rule.metric != name:
            continue
        assert rule.start is not None  # `Recipe.rules` fills it in
        counted = (row[name] for row in found if row["step"] > rule.start and name in row)
        base = {"teacher": teacher, "first": next(counted, None), None: 1.0}[rule.relative_to]
        side, bound = ("above", rule.above) if rule.above is not None else ("below", rule.below)
        if base is not None and bound is not None:
            levels.append(("limit", f"{rule.action}s {side} {number(bound * base)}", bound * base))
    return [level for level in levels if math.isfinite(level[2])]


def _chart(name: str, group: str, lines: list[Line], runs: Sequence[tuple[Recipe, Sequence[rules.Row]]]) -> Chart:
    settings, rows = runs[0]
    levels = levels_of(name, settings, rows) if group == "Early warning" else []
    values = [value for line in lines for _, value in line.points]
    low, high, shown = _range(values, levels)
    logarithmic = low > 0 and high / low > 100
    steps = max(recipe.run.steps for recipe, _ in runs)
    place_y = _scale(low, high, HEIGHT - BOTTOM, TOP, logarithmic)
    place_x = _scale(0, steps, LEFT, WIDTH - RIGHT, False)
    return Chart(
        name,
        group,
        [Line(line.run, line.points, _path(line.points, place_x, place_y)) for line in lines],
        [(kind, text, round(place_y(value), 1)) for kind, text, value in shown],
        [(stage.replace("_", " "), round(place_x(end), 1)) for stage, end in list(settings.stages.items())[:-1]],
        [(f"{round(x):,}", round(place_x(x), 1)) for x in (0, steps / 2, steps)],
        _labelled(_ticks(low, high, logarithmic), place_y),
        steps,
        logarithmic,
        [f"{text} lies outside the chart" for kind, text, value in levels if (kind, text, value) not in shown],
    )


def _range(
    values: Sequence[float], levels: Sequence[tuple[str, str, float]]
) -> tuple[float, float, list[tuple[str, str, float]]]:
    """The range of the values and of those levels that do not squeeze them into less than a third of the chart.

    It is at least a thousandth of the largest value, so that five digits can name its ticks.
    """
    low, high = min(values), max(values)
    missing = max(0.0, max(-low, high) / 1000 - (high - low))
    low, high = low - missing / 2, high + missing / 2
    span = high - low
    shown = []
    for level in sorted(levels, key=lambda each: max(low - each[2], each[2] - high)):
        if max(high, level[2]) - min(low, level[2]) <= 3 * span:
            shown.append(level)
    inside = [low, high, *(value for _, _, value in shown)]
    low, high = min(inside), max(inside)
    margin = 0.06 * (high - low)
    return (low if low > 0 and high / low > 100 else low - margin), high + margin, shown


def _scale(low: float, high: float, start: float, end: float, logarithmic: bool) -> Place:
    if logarithmic:
        low, high = math.log(low), math.log(high)
    return lambda value: start + (end - start) * ((math.log(value) if logarithmic else value) - low) / (high - low)


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    """Round numbers within the range: powers of ten, or multiples of 1, 2 or 5 times a power of ten."""
    if logarithmic:
        return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _labelled(ticks: Sequence[float], place: Place) -> list[tuple[str, float]]:
    """Each tick's text and place; with more than three digits where fewer would make neighbours look equal."""
    exact = (n for n in range(3, 6) if all(math.isclose(float(f"{tick:.{n}g}"), tick) for tick in ticks))
    digits = next(exact, 5)
    return [(number(tick, digits), round(place(tick), 1)) for tick in ticks]


def _path(points: Sequence[Point], place_x: Place, place_y: Place) -> str:
    return " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, or as many as asked for; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}".replace("-", "−")


def spoken(chart: Chart, names: Sequence[str]) -> str:
    """What a chart shows, for a reader who does not see it."""
    said = [
        f"{names[line.run] + ': ' if len(names) > 1 else ''}from {number(line.points[0][1])} at step "
        f"{line.points[0][0]:.0f} to {number(line.points[-1][1])} at step {line.points[-1][0]:.0f}"
        for line in chart.lines
    ]
    return "; ".join([f"{chart.name}, {said[0]}", *said[1:], *(text for _, text, _ in chart.levels)])


def last_values(rows: Sequence[rules.Row]) -> Mapping[str, float]:
    """The last value that was logged under each name."""
    return {name: value for row in rows for name, value in row.items()}
