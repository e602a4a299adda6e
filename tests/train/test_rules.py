"""Every rule on histories written by hand: those at which it must speak, and those at which it must not."""

import json
from pathlib import Path
from typing import Any

import pytest
from dmdr_train.monitoring import rules
from dmdr_train.recipe.schema import DEFAULT_RULES, AnyRule, Limit, RewardHacking

HACKING = RewardHacking(kind="reward_hacking", evaluations=3, start=0)
NARROW = Limit(kind="limit", metric="diversity", below=0.5, relative_to="teacher", evaluations=2, start=20)


def history(**series: list[float]) -> list[rules.Row]:
    """Evaluations at steps 10, 20, …; two underscores are a slash."""
    names = [name.replace("__", "/") for name in series]
    return [
        {"step": 10 * (i + 1), **dict(zip(names, row, strict=True))}
        for i, row in enumerate(zip(*series.values(), strict=True))
    ]


def spoke_at(rule: AnyRule, found: list[rules.Row]) -> list[int]:
    return [alarm.step for alarm in rules.all_alarms([rule], found)]


UP, DOWN = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("series", "steps"),
    [
        ({"trained__refl": UP, "held_out__a": DOWN, "diversity": DOWN}, [40]),
        ({"trained__refl": DOWN, "held_out__a": DOWN, "diversity": DOWN}, []),
        ({"trained__refl": UP, "held_out__a": UP, "diversity": DOWN}, []),
        ({"trained__refl": UP, "held_out__a": DOWN, "diversity": UP}, []),
        ({"trained__refl": [1.0, 1.0, 2.0, 3.0], "held_out__a": DOWN, "diversity": DOWN}, []),
        ({"trained__refl": UP, "held_out__a": DOWN, "diversity": [1.0, 0.97, 0.94, 0.91]}, []),
        ({"trained__refl": UP, "held_out__a": DOWN, "diversity": [1.0, 0.97, 0.94, 0.89]}, [40]),
        ({"trained__refl": UP[:3], "held_out__a": DOWN[:3], "diversity": DOWN[:3]}, []),
        ({"trained__refl": UP, "held_out__a": [4.0, 3.0, 3.5, 3.0], "diversity": DOWN}, []),
        ({"trained__refl": UP, "held_out__a": DOWN, "held_out__b": UP, "diversity": DOWN}, []),
        ({"trained__a": UP, "trained__b": DOWN, "held_out__c": DOWN, "held_out__d": DOWN, "diversity": DOWN}, [40]),
        ({"trained__refl": [0.0, *UP, 5.0], "held_out__a": [5.0, *DOWN, 0.0], "diversity": [5.0, *DOWN, 0.0]}, [40]),
    ],
)  # fmt: skip
def test_reward_hacking(series: dict[str, list[float]], steps: list[int]) -> None:
    """A trained reward up, all held-out ones and the diversity down, at three changes in a row; said once."""
    assert spoke_at(HACKING, history(**series)) == steps


@pytest.mark.parametrize(
    ("diversity", "steps"),
    [
        ([0.1, 0.1, 0.9, 0.9, 0.9], []),  # a student that has not begun yet
        ([1.0, 1.0, 0.9, 0.4, 0.4], [50]),
        ([1.0, 1.0, 0.4, 0.9, 0.4], []),
        ([1.0, 1.0, 0.5, 0.5, 0.5], []),
        ([1.0, 1.0, 0.4, 0.4, 0.4], [40]),
        ([0.4, 0.4, 0.4, 0.4, 0.4], [40]),
    ],
)
def test_a_limit_relative_to_the_teacher(diversity: list[float], steps: list[int]) -> None:
    halved = [value / 2 for value in diversity]
    assert spoke_at(NARROW, history(diversity=halved, teacher__diversity=[0.5] * 5)) == steps


def test_a_limit_relative_to_its_first_value() -> None:
    """The first that counts."""
    rule = Limit(kind="limit", metric="contrast", above=1.5, relative_to="first", evaluations=1, start=10)
    assert spoke_at(rule, history(contrast=[9.0, 2.0, 2.9, 3.1, 2.0, 4.0])) == [40, 60]


def test_a_limit_as_it_is() -> None:
    rule = Limit(kind="limit", metric="drift/mean", above=0.5, evaluations=2, start=0)
    assert spoke_at(rule, history(drift__mean=[0.6, 0.4, 0.6, 0.6])) == [40]
    assert spoke_at(rule, history(diversity=[0.6, 0.6])) == []  # not measured
    assert spoke_at(rule, history(drift__mean=[float("nan")] * 3)) == []


def test_a_rule_that_stops_does_so_as_long_as_it_holds() -> None:
    stop = NARROW.model_copy(update={"action": "stop"})
    found = history(diversity=[1.0, 1.0, 0.4, 0.4, 0.4], teacher__diversity=[1.0] * 5)
    assert spoke_at(stop, found) == [40, 50]


def test_the_line_names_rule_metric_values_and_what_to_do() -> None:
    found = history(diversity=[1.0, 1.0, 0.4, 0.2], teacher__diversity=[1.0] * 4)
    (alarm,) = rules.all_alarms([NARROW], found)
    assert str(alarm) == (
        "early warning at step 40: limit: diversity 0.4, 0.2 of the teacher's is below 0.5; "
        "lower the weight of the reward, or stop it earlier (objectives: weight, stop)"
    )
    (alarm,) = rules.all_alarms([HACKING], history(trained__refl=UP, held_out__a=DOWN, diversity=DOWN))
    assert "trained/refl 1, 2, 3, 4 rises while diversity 4, 3, 2, 1 and held_out/a 4, 3, 2, 1 fall" in str(alarm)


def test_what_training_did_since_the_last_evaluation() -> None:
    def row(step: int, norm: float, **more: float) -> dict[str, float]:
        losses = {"loss/fake_score": 2.0 * norm, "loss/distribution_matching": norm}
        return {"step": step, "grad_norm/refl": norm, **losses, **more}

    before: list[rules.Row] = [row(1, 100.0), row(2, 100.0, **{"watch/diversity": 1.0}), row(3, 1.0)]
    quiet = row(4, 3.0)
    assert rules.completed(quiet, before) == quiet
    found = rules.completed({**quiet, "watch/diversity": 2.0}, before)
    assert found["watch/grad_norm/refl"] == 2.0
    assert found["watch/fake_score_ratio"] == 2.0
    assert found["watch/diversity"] == 2.0
    assert rules.remembered(before) == before[1:]


def test_the_history_is_read_back_up_to_the_resumed_step(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss/x": 1.0}, {"step": 2, "watch/a": 1 / 3}, {"step": 3, "loss/x": 1.0},
                                  {"step": 4, "watch/a": 0.2}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = rules.logged_before(tmp_path / "checkpoints" / "step-00000003", 3)
    assert before == rows[:3]
    found = rules.remembered(before)
    assert found == rows[1:3]
    assert rules.evaluations(found) == [{"step": 2, "a": 1 / 3}]


def test_no_default_rule_stops() -> None:
    assert {rule.action for rule in DEFAULT_RULES} == {"warn"}
