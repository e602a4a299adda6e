"""What a terminal shows of a run, and what a log file gets."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dmdr_train.recipe.schema import Recipe
from dmdr_train.tracking import progress as progress_module
from dmdr_train.tracking.progress import WIDTH, Progress, Trend, duration, short_name, sparkline
from dmdr_train.tracking.run_tracker import open_tracker
from dmdr_train.tracking.terminal import LiveView, open_view
from rich.console import Console

JOINT = [
    {"kind": "distribution_matching"},
    {"kind": "refl", "start": 6, "reward": {"name": "class-label", "checkpoint": "classifier"}},
]
ROW = {"loss/refl": 0.25, "lr/generator": 1e-3, "watch/held_out/clip": 0.3, "watch/teacher/held_out/clip": 0.5}


class Clock:
    """Stands in for `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def test_the_blocks_follow_the_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 3]) == "▄▄"
    assert sparkline([3]) == ""
    assert sparkline([0, 2] * WIDTH) == "▄" * WIDTH  # means of pairs


def test_a_trend_stays_short_and_is_of_the_whole_run() -> None:
    trend = Trend()
    trend.add(math.nan)
    for value in range(16 * WIDTH):
        trend.add(value)
    assert trend.last == 16 * WIDTH - 1
    assert len(trend.means) < 2 * WIDTH
    assert trend.means[0] == pytest.approx(trend.means[1] / 3, abs=0.5)  # equal parts from the first value on
    assert trend.line() == "".join(sorted(trend.line()))
    assert trend.line()[0] == "▁"
    assert trend.line()[-1] == "█"


def test_the_time_left_is_that_of_the_last_steps(make_recipe: Callable[..., Recipe], clock: Clock) -> None:
    progress = Progress(make_recipe(run__steps=1000), 0)
    assert progress.pace == ""
    for seconds in [100.0] + [2.0] * progress_module.TIMED:
        clock.now += seconds
        progress.advance()
    assert progress.pace == "2 s per step, 32 min left"  # (1000 - 51) · 2 s


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(45, "45 s"), (89, "89 s"), (720, "12 min"), (3570, "1 h 0 min"), (12000, "3 h 20 min"), (187200, "2 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_short_names() -> None:
    names = ("loss/refl", "watch/held_out/clip", "watch/diversity", "memory")
    assert list(map(short_name, names)) == ["loss refl", "held out clip", "diversity", "memory"]


def test_a_log_file_gets_a_line_per_logged_row(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    tracker = open_tracker(tmp_path, make_recipe(objectives=JOINT), 4)
    for seconds in (1.0, 2.0, 3.0):
        clock.now += seconds
        tracker.advance()
    tracker.log(7, ROW)
    tracker.close()
    line = "step 7 of 10, joint, 2 s per step, 6 s left, loss refl 0.25, held out clip 0.3 (teacher 0.5)\n"
    assert capsys.readouterr() == (line, "")


def test_the_view_of_a_terminal(make_recipe: Callable[..., Recipe], clock: Clock) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss/refl": 1.0}, {"step": 2, "loss/refl": 0.5}]
    progress = Progress(make_recipe(objectives=JOINT), 2, rows)
    progress.warnings.append("warning: the disk is full")
    clock.now = 2.0
    progress.advance()
    progress.log({**ROW, "memory": 20.25})
    screen = io.StringIO()
    view = LiveView(progress, Console(file=screen, force_terminal=True, width=100, color_system=None))
    print("printed meanwhile")
    view.close()
    shown = screen.getvalue()
    assert "printed meanwhile\n" in shown
    for text in ("cold start  step 3 of 10", "━", "2 s per step, 14 s left", "0.25  █▃▁", "20.2 GiB"):
        assert text in shown
    assert "held out clip  0.3 (teacher 0.5)" in shown
    assert "! warning: the disk is full" in shown
    assert "lr" not in shown


class Stream(io.StringIO):
    """Stands in for stdout: a terminal or a file, with an encoding."""

    encoding = "utf-8"
    terminal = True

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "encoding", "kind", "live"),
    [
        (True, "utf-8", "xterm", True),
        (False, "utf-8", "xterm", False),
        (True, "ascii", "xterm", False),
        (True, "utf-8", "dumb", False),
    ],
)
def test_only_a_terminal_gets_the_live_view(
    make_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    encoding: str,
    kind: str,
    live: bool,
) -> None:
    stream = Stream()
    stream.terminal, stream.encoding = terminal, encoding  # type: ignore[misc]
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("TERM", kind)
    view = open_view(Progress(make_recipe(), 0))
    view.close()
    assert isinstance(view, LiveView) == live


def test_warnings_are_remembered_and_other_lines_are_not(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = open_tracker(tmp_path, make_recipe(), 0)
    tracker.say("student at step 4: FD 3.2")
    tracker.say("warning: a")
    tracker.warn(4, "early warning at step 4: limit")
    tracker.close()
    assert list(tracker.progress.warnings) == ["warning: a", "early warning at step 4: limit"]
    assert capsys.readouterr().out.count("\n") == 3
