"""A short version of the demo: one step of the student is far better than one step of the teacher, and the reward
raises the accuracy of another classifier above that of equally long training without the reward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dmdr_train.evaluation.scores import Scores, read_scores

ROOT = Path(__file__).parents[2]
COMMAND = "deepspeed --num_accelerators 2 packages/dmdr-train/run.py --config demo"
SHORT = (
    "guidance.dynamics.steps=40",
    "objectives.1.start=40",
    "objectives.1.weight=1.0",
    "run.steps=70",
    "optim.ema=0.9",
    "tracking.samples.every=0",
    "tracking.evaluation.pictures=500",
    "tracking.evaluation.teacher_steps=[1]",
)
CONTROL = ("objectives=[{kind: distribution_matching}]", "tracking.evaluation.teacher_steps=[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def train(python: Callable[..., Any], folder: Path) -> Callable[..., dict[str, Scores]]:
    def train(name: str, *overrides: str, **started: Any) -> dict[str, Scores]:
        program = ("packages/dmdr-train/run.py", "--config", "demo", f"run.output={folder / name}")
        python(*program, *SHORT, *overrides, folder=ROOT, **started).check()
        return read_scores(folder / name)

    return train


@pytest.fixture(scope="module")
def rewarded(train: Callable[..., dict[str, Scores]]) -> dict[str, Scores]:
    """Run the README's command."""
    assert f"    DS_ACCELERATOR=cpu {COMMAND}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    return train("rewarded", launcher="deepspeed", processes=2)


@pytest.fixture(scope="module")
def control(train: Callable[..., dict[str, Scores]]) -> Scores:
    """Train equally long without the reward."""
    return train("control", *CONTROL)["cold_start"]


def test_one_step_of_the_student_beats_one_step_of_the_teacher(rewarded: dict[str, Scores], control: Scores) -> None:
    teacher = rewarded["teacher-1"]
    assert control.frechet < 0.3 * teacher.frechet
    assert control.frechet_pixels < 0.3 * teacher.frechet_pixels
    assert control.recall > teacher.recall + 0.2
    assert rewarded["real"].frechet < 0.2 * control.frechet  # the measure distinguishes real pictures from drawn ones


def test_the_reward_lifts_the_accuracy_that_another_classifier_measures(
    rewarded: dict[str, Scores], control: Scores
) -> None:
    assert rewarded["joint"].accuracy > control.accuracy + 0.05


def test_the_run_leaves_what_it_promises(folder: Path, rewarded: dict[str, Scores]) -> None:
    made = ("recipe.yaml", "metrics.jsonl", "summary.md", "report.html", "before_after.png", "curves.png")
    for name in (*made, "student/dmdr.json"):
        assert (folder / "rewarded" / name).stat().st_size > 0
    summary = (folder / "rewarded" / "summary.md").read_text(encoding="utf-8")
    assert all(row.name in summary for row in rewarded.values())
