"""The panels of curves.png: which there are, their lines, and their scales."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.curves import Panel, panels, running_median, scale

RULES = [
    {"kind": "limit", "metric": "diversity", "below": 0.5, "relative_to": "teacher"},
    {"kind": "limit", "metric": "saturation", "above": 2.0, "relative_to": "first", "start": 3},
    {"kind": "limit", "metric": "drift/std", "above": 0.5, "start": 0},
]


@pytest.fixture
def settings(make_recipe: Callable[..., Recipe]) -> Recipe:
    reward = {"kind": "refl", "start": 2, "reward": {"name": "class-label", "checkpoint": "classifier"}}
    return make_recipe(objectives=[{"kind": "distribution_matching"}, reward], watch={"rules": RULES})


def test_panels_are_of_what_changes(settings: Recipe) -> None:
    rows: Any = [
        {"step": 1, "watch/diversity": 0.4, "lr/generator": 0.1, "weight/refl": 1.0, "loss/refl": 3.0, "reward/a": 1.0},
        {"step": 2, "watch/diversity": 0.3, "lr/generator": 0.2, "weight/refl": 1.0, "loss/refl": math.nan},
        {"step": 3, "teacher_scale": 0.5, "loss/fake_score": 1.0, "reward/a": 2.0, "loss/refl": 3.0},
        {"step": 4, "teacher_scale": 0.4, "loss/fake_score": 2.0, "watch/teacher/diversity": 0.5},
    ]
    found = {panel.name: panel.points for panel in panels(rows, settings)}
    assert list(found) == ["loss/fake_score", "reward/a", "teacher_scale", "watch/diversity"]
    assert found["reward/a"] == [(1, 1.0), (3, 2.0)]


def test_a_panel_has_the_teacher_and_the_limits(settings: Recipe) -> None:
    rows: Any = [
        {
            "step": step,
            "watch/diversity": 0.1 * step,
            "watch/teacher/diversity": 0.8,
            "watch/saturation": 0.1 * step,
            "watch/drift/std": 0.01 * step,
        }
        for step in (2, 3, 4, 5)
    ]
    lines = {panel.name: panel.lines for panel in panels(rows, settings)}
    teacher = [(step, 0.8) for step in (2, 3, 4, 5)]
    assert lines["watch/diversity"] == [("teacher", teacher), ("limit", [(3, 0.4), (4, 0.4), (5, 0.4)])]
    assert lines["watch/saturation"] == [("limit", [(4, 0.8), (5, 0.8)])]
    rows[1]["watch/saturation"] = rows[2]["watch/saturation"] = 0.0  # a share of 0 is no limit
    assert {panel.name: panel.lines for panel in panels(rows, settings)}["watch/saturation"] == []
    assert lines["watch/drift/std"] == [("limit", [(step, 0.5) for step in (2, 3, 4, 5)])]


def of(*values: float, **lines: float) -> tuple[bool, float, float]:
    return scale(Panel("loss/refl", list(enumerate(values)), [(kind, [(0, value)]) for kind, value in lines.items()]))


def test_a_scale_leaves_out_what_lies_far_out() -> None:
    assert of(*range(100)) == (False, pytest.approx(-5.94), pytest.approx(104.94))  # 99 with a border of 6 %
    logarithmic, low, high = of(*range(100), 100000)
    assert (logarithmic, high) == (False, pytest.approx(105, abs=3))
    assert low < 0
    assert of(0, 1, 1000)[2] > 1000  # of few points, none is an outlier


def test_a_scale_is_logarithmic_where_positive_values_span_decades() -> None:
    logarithmic, low, high = of(0.01, 1.0, 10.0)
    assert logarithmic
    assert low == pytest.approx(0.01 / 10**0.18)
    assert high == pytest.approx(10 * 10**0.18)
    assert not of(0.0, 1.0, 1000.0)[0]
    assert not of(1.0, 50.0)[0]


def test_the_teacher_is_always_seen_and_a_far_limit_is_not() -> None:
    assert of(1.0, 2.0, teacher=9.0)[2] > 9
    assert of(1.0, 2.0, limit=2.9)[2] > 2.9
    assert of(1.0, 2.0, limit=9.0)[2] < 2.2


def test_noise_does_not_fill_a_panel() -> None:
    _, low, high = of(0.25, 0.251)
    assert high - low > 0.025
    _, low, high = of(*[0.0] * 100, 7.0)
    assert low < 0 < high


def test_the_median_ignores_a_single_value() -> None:
    assert running_median([1.0] * 59) == []
    smooth = running_median([*[1.0] * 50, 99.0, *[1.0] * 50])
    assert smooth == [1.0] * 101
