"""Signals that end a run: after its step, in a line, and at once where the first is not heeded."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from dmdr_train.base.errors import StoppedError
from dmdr_train.base.exit_codes import STOPPED
from dmdr_train.checkpoint.manifest import verify
from dmdr_train.distributed import signals
from dmdr_train.tracking.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    make_run: Any, number: signal.Signals, names: Any, during_step: Any
) -> None:
    run = make_run()
    before = [signal.getsignal(n) for n in signals.STOPPING]
    during_step(run, 1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(StoppedError) as caught, run.stopping.signals:
        run.carry_out()
    assert caught.value.code == 75
    assert str(caught.value).startswith(f"by {number.name}; saved in {run.folder}/checkpoints/step-00000002; start")
    assert names(run) == ["step-00000002"]
    verify("run.resume", run.folder / "checkpoints/step-00000002")
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2]
    assert [signal.getsignal(n) for n in signals.STOPPING] == before


def test_what_was_due_at_the_last_checkpoint_is_made_up_for(make_run: Any, during_step: Any) -> None:
    """The signal comes in between; a kill might, too."""
    changes = {"tracking__samples": {"count": 2, "every": 2}, "run__steps": 3}
    run = make_run(**changes)
    during_step(run, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError), run.stopping.signals:
        run.carry_out()
    assert not (run.folder / "samples").exists()
    make_run(**changes, run__resume="auto").carry_out()
    assert os.listdir(run.folder / "samples") == ["student-00000002.png"]


def test_a_signal_keeps_an_evaluation_from_beginning(make_run: Any, classifier: Path, names: Any) -> None:
    """It would be taken again; the state before it is saved."""
    evaluation = {
        "classifier": str(classifier),
        "reference": "shapes",
        "pictures": 100,
        "every": 2,
        "teacher_steps": [],
    }
    run = make_run(tracking__evaluation=evaluation)
    run.results.sample_student = lambda name: None
    show = run.results.show

    def showing() -> None:
        if run.trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while run.stopping.signals.received is None:
                time.sleep(0.01)
        show()

    run.results.show = showing
    with pytest.raises(StoppedError, match=r"^by SIGTERM; saved in .*step-00000002"), run.stopping.signals:
        run.carry_out()
    assert names(run) == ["step-00000002"]
    assert not (run.folder / "evaluation.json").exists()


def test_a_second_signal_ends_the_process_even_where_the_first_is_not_heeded() -> None:
    """The main thread is stuck; a repetition at once is the same signal by another way."""
    program = """
import ctypes, os, threading, time
from dmdr_train.distributed import signals
signals.SAME = 0.3
with signals.Signals() as received:
    def send():
        for pause in (0, 0.05, 0.5):
            time.sleep(pause)
            print(received.received, flush=True)
            os.kill(os.getpid(), signals.signal.SIGINT)
    threading.Thread(target=send, daemon=True).start()
    ctypes.CDLL(None).poll(None, 0, 60_000)  # goes on when it is interrupted, as gloo does
    ctypes.CDLL(None).poll(None, 0, 60_000)
    ctypes.CDLL(None).poll(None, 0, 60_000)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stdout.split() == ["None", "SIGINT", "SIGINT"]
    assert done.stderr.startswith("a second signal: process ")


@pytest.mark.parametrize("number", signals.STOPPING)
def test_signals_outside_of_training_end_it_in_a_line(number: signal.Signals) -> None:
    program = f"""
import os
from dmdr_train.base import errors
from dmdr_train.distributed import signals
with errors.user_errors(), signals.signals_end():
    with signals.Signals() as received:
        os.kill(os.getpid(), {number:d})
    os.kill(os.getpid(), {number:d})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == STOPPED
    assert done.stderr == f"stopped: by {number.name}, outside of training; start again\n"


def test_signals_after_an_error_do_not_hide_it() -> None:
    program = """
import os
from dmdr_train.base import errors
from dmdr_train.distributed import signals
with errors.user_errors():
    try:
        with signals.signals_end():
            raise errors.UserError("run.steps", "is no number")
    finally:
        os.kill(os.getpid(), signals.signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert done.returncode == 2
    assert done.stderr == "error: run.steps: is no number\n"


def test_other_signals_are_left_alone() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: seen.append(number))
    try:
        with signals.Signals() as received:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.05)
            assert received.received is None
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2]
