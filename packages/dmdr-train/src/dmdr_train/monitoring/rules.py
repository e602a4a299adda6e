"""Early warning, second part: which rules hold after an evaluation. Pure functions of the logged rows.

The rows are read from metrics.jsonl, so a resumed run gives the same alarms as an uninterrupted one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dmdr_train.base.errors import naming
from dmdr_train.checkpoint.find import run_of
from dmdr_train.recipe.schema import AnyRule, Limit, RewardHacking
from dmdr_train.tracking.metrics_file import read_metrics

PREFIX = "watch/"
"""How the logged names of an evaluation's metrics begin."""

Row = Mapping[str, float]
"""A logged row, or an evaluation: `step`, and values by name."""

REWARD_ADVICE = "lower the weight of the reward, or stop it earlier (objectives: weight, stop)"
ADVICE = {
    "fake_score_ratio": "train the fake score more (guidance.ratio, optim.fake_score.lr)",
    "grad_norm/distribution_matching": "lower optim.generator.lr, or raise guidance.ratio",
    "past_margin/": "most pictures are past the margin; stop the reward (objectives: stop), or raise its margin",
}


@dataclass(frozen=True)
class Alarm:
    """A rule that holds at a step, and a text: what was measured, and what to do."""

    step: int
    rule: AnyRule
    text: str

    def __str__(self) -> str:
        return f"early warning at step {self.step}: {self.text}"


def logged_before(checkpoint: Path, step: int) -> list[Row]:
    """Read the rows that the run of a checkpoint logged up to a step, including rows saved with the checkpoint.

    Raises:
        UserError: a file cannot be read.
    """
    with naming("run.resume"):
        rows = {row["step"]: row for each in (run_of(checkpoint), checkpoint) if each for row in read_metrics(each)}
    return [rows[at] for at in sorted(rows) if at <= step]


def remembered(rows: Sequence[Row]) -> list[Row]:
    """The rows that later calls need: all evaluations, and all rows after the last evaluation."""
    return [*(row for row in rows if is_evaluation(row)), *_since_evaluation(rows)]


def completed(
    values: Mapping[str, float], before: Sequence[Row], matching: str = "distribution_matching"
) -> dict[str, float]:
    """Complete the values of a step: an evaluation gets means over the rows since the last evaluation and this row.

    These are the means of every gradient norm and of every share of rewards past their margin, over finite values, and
    `fake_score_ratio`, the mean loss of the fake score divided by that of distribution matching.

    Args:
        values: of the step.
        before: earlier rows, from `remembered`.
        matching: the name of the objective that matches distributions.
    """
    if not is_evaluation(values):
        return dict(values)
    rows = [*_since_evaluation(before), values]
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row[name] for row in rows if math.isfinite(row.get(name, math.nan))] for name in names}
    means = {name: sum(numbers) / len(numbers) for name, numbers in found.items() if numbers}
    metrics = {name: mean for name, mean in means.items() if name.startswith(("grad_norm/", "past_margin/"))}
    if means.get(f"loss/{matching}") and "loss/fake_score" in means:
        metrics["fake_score_ratio"] = means["loss/fake_score"] / means[f"loss/{matching}"]
    return {**values, **{f"{PREFIX}{name}": value for name, value in metrics.items()}}


def _since_evaluation(rows: Sequence[Row]) -> Sequence[Row]:
    return rows[max((i + 1 for i, row in enumerate(rows) if is_evaluation(row)), default=0) :]


def is_evaluation(row: Row) -> bool:
    """Whether a row has the values of an evaluation."""
    return any(name.startswith(PREFIX) for name in row)


def evaluations(rows: Iterable[Row]) -> list[Row]:
    """The evaluations among logged rows; their metrics have the names that rules use."""
    return [
        {"step": row["step"], **{n.removeprefix(PREFIX): v for n, v in row.items() if n.startswith(PREFIX)}}
        for row in rows
        if is_evaluation(row)
    ]


def judge(rules: Sequence[AnyRule], found: Sequence[Row]) -> list[Alarm]:
    """The alarms after the last of the evaluations `found`.

    A rule with `action: stop` gives an alarm whenever it holds, a rule with `action: warn` when it begins to hold.
    """
    step = int(found[-1]["step"])
    return [
        Alarm(step, rule, text)
        for rule in rules
        if (text := holds(rule, found)) and (rule.action == "stop" or not holds(rule, found[:-1]))
    ]


def all_alarms(rules: Sequence[AnyRule], found: Sequence[Row]) -> list[Alarm]:
    """The alarms after each of the evaluations."""
    return [alarm for i in range(len(found)) for alarm in judge(rules, found[: i + 1])]


def holds(rule: AnyRule, found: Sequence[Row]) -> str:
    """The values for which the rule holds at the last evaluation, and advice; empty if it does not hold."""
    assert rule.start is not None  # `Recipe.rules` fills it in
    counted = [row for row in found if row["step"] > rule.start]
    seen = limit(rule, counted) if isinstance(rule, Limit) else reward_hacking(rule, counted)
    metric = rule.metric if isinstance(rule, Limit) else ""
    advice = next((text for name, text in ADVICE.items() if metric.startswith(name)), REWARD_ADVICE)
    return f"{rule.kind}: {seen}; {advice}" if seen else ""


def reward_hacking(rule: RewardHacking, counted: Sequence[Row]) -> str:
    """Check that a trained reward rises at each evaluation, while diversity and all held-out rewards fall.

    The rule looks at the last `rule.evaluations` changes, which takes one evaluation more. Over these evaluations the
    diversity must also lose the share `rule.fall` of its value.
    """
    window = counted[-rule.evaluations - 1 :]
    if len(window) <= rule.evaluations:
        return ""
    falling = ["diversity", *(name for name in window[-1] if name.startswith("held_out/"))]
    rising = [n for n in window[-1] if n.startswith("trained/") and _moves(window, n, 1)]
    if not rising or not all(_moves(window, name, -1) for name in falling):
        return ""
    if window[-1]["diversity"] > (1 - rule.fall) * window[0]["diversity"]:
        return ""
    return f"{_series(window, rising[0])} rises while {' and '.join(_series(window, n) for n in falling)} fall"


def limit(rule: Limit, counted: Sequence[Row]) -> str:
    """Check that the metric is above or below its limit at each of the last `rule.evaluations` evaluations."""
    window = counted[-rule.evaluations :]
    base = {"teacher": f"teacher/{rule.metric}", "first": rule.metric, None: None}[rule.relative_to]
    values = []
    for row in window:
        value = row.get(rule.metric)
        whole = 1.0 if base is None else (counted[0] if rule.relative_to == "first" else row).get(base, 0.0)
        if value is None or whole <= 0:
            return ""
        values.append(value / whole)
    side, bound = ("above", rule.above) if rule.above is not None else ("below", rule.below)
    assert bound is not None
    beyond = [value > bound if side == "above" else value < bound for value in values]
    if len(values) < rule.evaluations or not all(beyond):
        return ""
    of = {"teacher": " of the teacher's", "first": " of its first value", None: ""}[rule.relative_to]
    return f"{rule.metric} {_numbers(values)}{of} is {side} {bound:g}"


def _moves(window: Sequence[Row], name: str, direction: int) -> bool:
    """Whether a metric rises (direction 1) or falls (-1) at every change."""
    values = [row.get(name, float("nan")) for row in window]
    return all((b - a) * direction > 0 for a, b in pairwise(values))


def _series(window: Sequence[Row], name: str) -> str:
    return f"{name} {_numbers([row[name] for row in window])}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
