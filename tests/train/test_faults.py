"""What happens to runs, done to whole runs and to their parts on this one process."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_train.base.errors import StoppedError, UserError
from dmdr_train.base.exit_codes import STOPPED
from dmdr_train.checkpoint import save
from dmdr_train.checkpoint.background_writes import Unhurried
from dmdr_train.checkpoint.find import checkpoints_in, find_checkpoint
from dmdr_train.checkpoint.manifest import read_manifest, verify
from dmdr_train.checkpoint.retention import prune, remove_leftovers
from dmdr_train.distributed import signals
from dmdr_train.distributed.collectives import agreed
from dmdr_train.distributed.deepspeed_internals import gathered
from dmdr_train.distributed.run_lock import check_free, hold
from dmdr_train.evaluation.scores import read_scores
from dmdr_train.monitoring import rules
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
from dmdr_train.run.preflight import check_output, goes_on
from dmdr_train.run.runner import Run, locked
from dmdr_train.run.saving import best_step
from dmdr_train.tracking import tensorboard
from dmdr_train.tracking.metrics_file import Rows, read_metrics
from dmdr_train.tracking.run_tracker import open_tracker
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")


@pytest.fixture
def make_run(make_recipe: Callable[..., Recipe], model: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run that is as short as can be, and draws and writes no more than it must."""

    def make(**changes: Any) -> Run:
        basis: dict[str, Any] = {
            "model__path": str(model),
            "guidance": {"ratio": 1},
            "optim__batch_size": 2,
            "run__steps": 4,
            "run__output": str(tmp_path / "out"),
            "tracking__samples": {"count": 2},
        }
        settings = make_recipe(**{**basis, **changes})
        resume_from = find_checkpoint(settings, lambda text: None)
        run: Any = Run(settings, build(settings, CPU, resumed=resume_from is not None), resume_from)
        run.results.begin = run.finish = lambda: None
        return run

    return make


def names(run: Run) -> list[str]:
    return [path.name for path in checkpoints_in(run.folder / "checkpoints")]


def during_step(run: Run, step: int, act: Callable[[], object]) -> None:
    """Have something happen while the step that starts at `step` is under way."""
    train_step = run.trainer.train_step

    def stepping() -> dict[str, float]:
        if run.trainer.step == step:
            act()
        return train_step()

    run.trainer.train_step = stepping  # type: ignore[method-assign]


# -- signals


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(make_run: Any, number: signal.Signals) -> None:
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


def test_what_was_due_at_the_last_checkpoint_is_made_up_for(make_run: Any) -> None:
    """The signal comes in between; a kill might, too."""
    changes = {"tracking__samples": {"count": 2, "every": 2}, "run__steps": 3}
    run = make_run(**changes)
    during_step(run, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError), run.stopping.signals:
        run.carry_out()
    assert not (run.folder / "samples").exists()
    make_run(**changes, run__resume="auto").carry_out()
    assert os.listdir(run.folder / "samples") == ["student-00000002.png"]


def test_a_signal_keeps_an_evaluation_from_beginning(make_run: Any, classifier: Path) -> None:
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


# -- a disk that is full


def full(path: str) -> bool:
    return ".partial/guidance/" in path and path.endswith("mp_rank_00_model_states.pt")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While its one item is true, the second engine's state finds no space."""
    switch = [True]
    save_state = save._save_state

    def failing(state: Any, path: Path) -> None:
        if switch[0] and full(str(path)):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_state(state, path)

    monkeypatch.setattr(save, "_save_state", failing)
    return switch


def test_a_full_disk_leaves_the_old_checkpoint_whole(
    make_run: Any, full_disk: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(run__checkpoint_every=1)
    full_disk[0] = False
    during_step(run, 1, lambda: full_disk.__setitem__(0, True))
    during_step(run, 3, lambda: full_disk.__setitem__(0, False))
    run.carry_out()
    assert names(run) == ["step-00000001", "step-00000004"]
    verify("run.resume", run.folder / "checkpoints/step-00000001")
    assert sorted(os.listdir(run.folder / "checkpoints")) == names(run)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert said == [
        f"warning: {run.folder}/checkpoints/step-0000000{n} could not be written (No space left on device); "
        f"the checkpoints before it are whole; the run goes on"
        for n in (2, 3)
    ]


@pytest.mark.parametrize("changes", [{"run__on_failed_save": "stop", "run__checkpoint_every": 2}, {}])
def test_a_full_disk_stops_the_run_where_it_was_to_or_must(make_run: Any, full_disk: Any, changes: Any) -> None:
    run = make_run(run__steps=3, **changes)
    with pytest.raises(StoppedError, match=r"could not be written \(No space left on device\)") as caught:
        run.carry_out()
    assert caught.value.code == 74
    assert run.trainer.step == (2 if changes else 3)
    assert os.listdir(run.folder / "checkpoints") == []


@pytest.mark.parametrize("stage", [0, 3])
def test_the_student_outlives_a_last_checkpoint_without_space(make_run: Any, full_disk: Any, stage: int) -> None:
    """Until the run that goes on has a student of its own."""
    changes = {"run__steps": 2, "run__checkpoint_every": 1, "optim__zero_stage": stage, "optim__ema": 0.5}
    run = make_run(**changes)
    full_disk[0] = False
    during_step(run, 1, lambda: full_disk.__setitem__(0, True))
    rescued = run.folder / "rescued-student"
    with pytest.raises(StoppedError, match=rf"before it are whole; its student, and no more, is in {rescued}$"):
        run.carry_out()
    student = dmdr_models.load("sit", rescued).load_network()
    assert all(torch.equal(p.flatten(), run.average.state[n].flatten()) for n, p in student.named_parameters())
    assert [path.name for path in run.folder.glob(".*student*")] == []
    assert names(run) == ["step-00000001"]
    full_disk[0] = False
    again = make_run(**changes, run__resume="auto")
    del again.finish
    again.carry_out()
    assert (run.folder / "student").is_dir()
    assert not rescued.exists()


@pytest.mark.parametrize("name", ["dmdr_train.checkpoint.save.save_file", "dmdr_train.run.milestones.export_student"])
def test_a_student_without_space_is_said(make_run: Any, full_disk: Any, monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(name, no_space)
    run = make_run(run__steps=1)
    with pytest.raises(StoppedError, match=r"; nor could its student \(No space left on device\)$"):
        run.carry_out()
    assert [path.name for path in run.folder.glob("*student*")] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system can be mounted by root alone")
@pytest.mark.parametrize("size", ["64k", "1m"])
def test_a_really_full_disk(make_run: Any, tmp_path: Path, size: str) -> None:
    (tmp_path / "out/checkpoints").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path / "out/checkpoints")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        run = make_run(run__steps=1)
        with pytest.raises(StoppedError, match=r"could not be written \(.*No space left on device"):
            run.carry_out()
        assert os.listdir(run.folder / "checkpoints") == []
    finally:
        subprocess.run(["umount", str(tmp_path / "out/checkpoints")], check=True)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def test_what_training_can_do_without_is_written_later() -> None:
    said: list[str] = []
    made: list[str] = []
    full = [True]
    write = Unhurried(said.append)

    def row(text: str) -> Callable[[], object]:
        return lambda: no_space() if full[0] else made.append(text)

    write("a.png", row("a"))
    write("b.json", row("old"))
    write("b.json", row("new"))
    assert made == []
    assert said == [
        f"warning: {name} could not be written (No space left on device); it is kept in memory and tried again"
        for name in ("a.png", "b.json")
    ]
    with pytest.raises(OSError, match="No space left"):
        write.finish()
    full[0] = False
    write.again()
    write.finish()
    assert made == ["a", "new"]


def test_samples_wait_for_space_and_the_report_is_written_when_it_can(make_run: Any, monkeypatch: Any) -> None:
    run = make_run(run__steps=2, tracking__samples={"count": 2, "every": 1})
    del run.finish
    monkeypatch.setattr("dmdr_train.evaluation.sample_sheets.save_png", no_space)
    monkeypatch.setattr("dmdr_train.run.milestones.save_png", no_space)
    with pytest.raises(
        StoppedError, match=r"the report in .* could not be written \(No space left on device\)"
    ) as caught:
        run.carry_out()
    assert caught.value.code == 74
    assert names(run) == ["step-00000002"]
    assert [row["step"] for row in read_metrics(run.folder)] == [1, 2]
    monkeypatch.undo()
    again = make_run(run__steps=2, tracking__samples={"count": 2, "every": 1}, run__resume="auto")
    del again.finish
    again.carry_out()
    assert (run.folder / "summary.md").stat().st_size > 0
    assert (run.folder / "samples/student-00000002.png").stat().st_size > 0


def test_a_run_does_not_begin_where_nothing_can_be_written(make_run: Any, monkeypatch: Any) -> None:
    run = make_run()
    monkeypatch.setattr("dmdr_train.run.runner.write_whole", no_space)
    with pytest.raises(StoppedError) as caught:
        run.carry_out()
    assert caught.value.code == 74
    assert str(caught.value) == (
        f"{run.folder} cannot be written to (No space left on device); make space, or give another run.output"
    )


# -- writing in the background


@pytest.mark.bits
def test_training_goes_on_while_a_checkpoint_is_written(make_run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """It holds what was there when it began, is seen when it is whole, and the next one waits for it."""
    changes = {"run__keep_last": 9, "optim__zero_stage": 2, "optim__ema": 0.5}
    usual = make_run(**changes, run__checkpoint_every=1)
    usual.carry_out()
    slow, save_state = threading.Event(), save._save_state

    def waiting(state: Any, path: Path) -> None:
        assert slow.wait(60)
        save_state(state, path)

    monkeypatch.setattr(save, "_save_state", waiting)
    output = str(tmp_path / "background")
    run = make_run(**changes, run__checkpoint_every=2, run__save_in_background=True, run__output=output)
    seen: list[list[str]] = []

    def act() -> None:
        seen.append(names(run))
        slow.set()

    during_step(run, 3, act)
    run.carry_out()
    assert seen == [[]]
    assert names(run) == ["step-00000002", "step-00000004"]
    for step in (2, 4):
        files, others = (read_manifest("", r.folder / f"checkpoints/step-0000000{step}")["files"] for r in (run, usual))
        assert files.keys() == others.keys()
        for name in files:
            assert files[name] == others[name] or not name.endswith(".safetensors"), name
    resumed = make_run(**changes, run__output=output, run__resume=f"{output}/checkpoints/step-00000002")
    resumed.carry_out()
    for a, b in zip(trained(resumed), trained(usual), strict=True):
        assert torch.equal(a, b)


def test_what_goes_wrong_in_the_background_is_said(make_run: Any, full_disk: Any, capsys: Any) -> None:
    run = make_run(run__checkpoint_every=1, run__save_in_background=True)

    def make_space() -> None:
        if run.checkpoints.saving:  # of the third checkpoint, which is to fail
            run.checkpoints.saving.writes.wait()
        full_disk[0] = False

    during_step(run, 3, make_space)
    run.carry_out()
    assert names(run) == ["step-00000004"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == 3
    assert all(
        "(No space left on device); the checkpoints before it are whole; the run goes on" in line for line in said
    )


def test_whatever_goes_wrong_in_the_background_is_no_checkpoint(make_run: Any, monkeypatch: Any) -> None:
    def failing(state: Any, path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(save, "_save_state", failing)
    run = make_run(run__checkpoint_every=1, run__save_in_background=True)
    with pytest.raises(StoppedError, match=r"could not be written \(MemoryError\)"):
        run.carry_out()
    assert os.listdir(run.folder / "checkpoints") == []


# -- numbers that are not finite


def broken_loss(run: Run, value: float, steps: tuple[int, ...]) -> list[Any]:
    """Add a value to the loss at these steps; returns the prompts of every sample, as a list that grows."""
    drawn: list[Any] = []
    objective: Any = run.trainer.objectives[0]
    compute = type(objective).__call__

    class Broken(type(objective)):  # type: ignore[misc]
        def __call__(self, sample: Any, guide: Any) -> Any:
            drawn.append(sample.prompts)
            loss, logs = compute(self, sample, guide)
            return (loss + value if sample.step in steps else loss), logs

    objective.__class__ = Broken
    return drawn


def trained(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.trainer.generator.module.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_update_that_is_not_finite_is_skipped(make_run: Any, precision: str, stage: int, value: float) -> None:
    run = make_run(optim__zero_stage=stage, optim__precision=precision)
    drawn = broken_loss(run, value, (0,))
    parameters = dict(run.trainer.generator.module.named_parameters())
    with gathered(parameters.values()):
        before = [p.detach().clone() for p in parameters.values()]
    run.trainer.train_step()
    assert run.trainer.trouble == [("distribution_matching", drawn[-1])]
    assert (run.trainer.generator.skipped_steps, run.trainer.guidance.skipped_steps) == (1, 0)
    with gathered(parameters.values()):
        assert all(torch.equal(p, b) for p, b in zip(parameters.values(), before, strict=True))
    run.trainer.train_step()
    assert run.trainer.trouble == []
    assert run.trainer.generator.skipped_steps == 1
    with gathered(parameters.values()):
        after = list(parameters.values())
        assert all(p.isfinite().all() for p in after)
        assert any(not torch.equal(p, b) for p, b in zip(after, before, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("stage", [0, 2])
def test_an_update_of_the_fake_score_that_is_not_finite_is_skipped(make_run: Any, stage: int, value: float) -> None:
    """Also where its gradient would be."""
    run = make_run(optim__zero_stage=stage)
    compute = run.trainer.guide.loss
    run.trainer.guide.loss = lambda sample: compute(sample) + value
    run.trainer.train_step()
    assert (run.trainer.generator.skipped_steps, run.trainer.guidance.skipped_steps) == (0, 1)
    assert run.trainer.trouble == [("fake_score", run.trainer.trouble[0][1])]


def test_a_gradient_inside_the_network_counts(make_run: Any) -> None:
    run = make_run()
    parameter = next(p for p in run.trainer.guidance.module.parameters() if p.requires_grad)
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    run.trainer.train_step()
    assert (run.trainer.generator.skipped_steps, run.trainer.guidance.skipped_steps) == (0, 1)
    assert run.skipped == 1
    hook.remove()
    run.trainer.train_step()
    assert run.skipped == 1


def test_the_run_stops_when_it_does_not_end(make_run: Any) -> None:
    run = make_run(run__max_skipped=2, run__steps=9)
    drawn = broken_loss(run, float("nan"), (0, 2, 3))
    with pytest.raises(StoppedError) as caught:
        run.carry_out()
    assert caught.value.code == 65
    prompts = ", ".join(map(repr, drawn[-1]))
    assert str(caught.value) == (
        f"2 steps in a row were skipped, since a loss or gradient was not finite: distribution_matching for {prompts}; "
        f"saved in {run.folder}/checkpoints/step-00000004"
    )
    rows = read_metrics(run.folder)
    assert [row["skipped/generator"] for row in rows] == [1, 1, 2, 3]
    for tensor in load_file(run.folder / "checkpoints/step-00000004/generator.safetensors").values():
        assert tensor.isfinite().all()


# -- which checkpoints stay


def test_what_is_kept(tmp_path: Path) -> None:
    def left(*arguments: Any) -> list[int]:
        for step in range(2, 20, 2):
            (tmp_path / f"step-{step:08d}").mkdir(exist_ok=True)
        prune(tmp_path, *arguments)
        assert all(not path.name.startswith(".") for path in tmp_path.iterdir())
        return [int(path.name[5:]) for path in checkpoints_in(tmp_path)]

    assert left(18, 1, 0, None) == [18]
    assert left(18, 2, 0, None) == [16, 18]
    assert left(18, 1, 6, None) == [6, 12, 18]
    assert left(18, 1, 8, 4) == [4, 8, 16, 18]
    assert left(10, 1, 6, 4) == [4, 6, 10]  # the run fell back behind those after it


@pytest.mark.parametrize(
    ("name", "best"),
    [("frechet", 4), ("accuracy", 6), ("held_out/a", 3), ("diversity", 5), ("trained/unmeasured", None), (None, None)],
)
def test_the_best_step(name: str | None, best: int | None) -> None:
    """The scores of a stage's end are no step's; what is no number is not the best."""
    numbers = {"step-2": (9.0, 0.1), "step-4": (3.0, 0.2), "step-6": (5.0, 0.3), "cold_start": (0.0, 1.0)}
    scores = {key: SimpleNamespace(frechet=distance, accuracy=share) for key, (distance, share) in numbers.items()}
    looks = {1: (1.0, 0.1), 3: (2.0, 0.2), 5: (float("nan"), 0.3)}
    history = [
        {"step": s, "watch/held_out/a": a, "watch/diversity": d, "loss/refl": 9.0} for s, (a, d) in looks.items()
    ]
    assert best_step(name, scores, history) == best  # type: ignore[arg-type]


def test_leftovers_are_removed(tmp_path: Path) -> None:
    for name in (".step-00000002.partial", ".step-00000001.removed", "step-00000003"):
        (tmp_path / "checkpoints" / name / "generator").mkdir(parents=True)
    (tmp_path / "samples").mkdir()
    for name in (".recipe.yaml.7.partial", "recipe.yaml", "samples/.teacher-4.png.7.partial", "samples/teacher-4.png"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    kept = ["checkpoints", "checkpoints/step-00000003", "checkpoints/step-00000003/generator"]
    assert sorted(files) == [*kept, "recipe.yaml", "samples", "samples/teacher-4.png"]


# -- two runs in one folder


def test_the_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    """The lock is held by another process, and ends with it, even by kill -9."""
    program = (
        "import sys, time; from pathlib import Path; from dmdr_train.distributed.run_lock import hold, sign\n"
        "file = hold(Path(sys.argv[1])); sign(file); print('held', flush=True); time.sleep(60)"
    )
    check_free(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for refuse in (check_free, hold):
            with pytest.raises(UserError) as caught:
                refuse(tmp_path)
            line = rf"run.output: {tmp_path} is in use by process {other.pid} on .*; wait for it, or give another"
            assert caught.match(line)
    finally:
        other.kill()
        other.wait()
    check_free(tmp_path)
    hold(tmp_path).close()


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", failing)
    hold(tmp_path).close()
    check_free(tmp_path)
    said = f"warning: {tmp_path} cannot be locked (No locks available); make sure that only one run uses it\n"
    assert capsys.readouterr().err == 2 * said


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_in_which_nothing_came_to_be_is_as_it_was(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
    with pytest.raises(UserError), locked(folder):
        raise UserError("model.path", "is of another family")
    assert folder.exists() == there
    assert not there or os.listdir(folder) == []
    with locked(folder):
        (folder / "recipe.yaml").touch()
    assert (folder / "recipe.yaml").exists()


# -- a run that goes on elsewhere


@pytest.mark.bits
def test_a_run_goes_on_in_another_folder_with_all_its_rows(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    during_step(run, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError), run.stopping.signals:
        run.carry_out()
    for _ in range(2):
        resume = {"run__resume": str(run.folder), "run__output": str(tmp_path / "there")}
        make_run(**resume).carry_out()
        assert [row["step"] for row in read_metrics(tmp_path / "there")] == [1, 2, 3, 4]


def test_a_run_takes_its_samples_and_scores_along(
    make_run: Any, make_recipe: Any, classifier: Path, tmp_path: Path
) -> None:
    """Those until its checkpoint; what it has lost of the teacher's is drawn again."""
    evaluation = {"classifier": str(classifier), "reference": "shapes", "pictures": 100, "every": 2}
    changes = {"tracking__samples": {"count": 2, "every": 1}, "tracking__evaluation": evaluation}
    changes |= {"run__checkpoint_every": 2, "run__keep_last": 9, "run__steps": 4}
    run = make_run(**changes)
    del run.results.begin
    run.carry_out()
    there = tmp_path / "there"
    at = str(run.folder / "checkpoints/step-00000002")
    resumed = make_run(**changes, run__resume=at, run__output=str(there))
    del resumed.results.begin
    (run.folder / "samples/teacher-1.png").unlink()
    agreed(resumed.open_folder)
    resumed.results.begin()
    resumed.tracker.close()
    names = sorted(path.name for path in (there / "samples").iterdir())
    assert names == ["student-00000001.png", "student-00000002.png", "teacher-1.png", "teacher-50.png"]
    for name in names[:2]:
        assert (there / "samples" / name).read_bytes() == (run.folder / "samples" / name).read_bytes()
    assert read_scores(there) == {"step-2": read_scores(run.folder)["step-2"]}


def test_steps_that_are_made_again_are_said(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(run__checkpoint_every=1, run__keep_last=9)
    run.carry_out()
    capsys.readouterr()
    again = make_run(run__resume=str(run.folder / "checkpoints/step-00000002"))
    again.carry_out()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    names_later = "step-00000003, step-00000004"
    assert said == [f"warning: {names_later}: these steps are made again, and go when the next checkpoint is there"]


def test_a_run_does_not_take_the_folder_of_another(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    run.carry_out()
    other = make_run(run__output=str(tmp_path / "other"))
    other.carry_out()
    settings = run.settings.model_copy(
        update={"run": run.settings.run.model_copy(update={"resume": str(other.folder)})}
    )
    with pytest.raises(UserError, match=rf"^run.output: {run.folder} already holds another run than {other.folder}"):
        check_output(settings)
    for resume in ("auto", str(run.folder), str(run.folder / "checkpoints/step-00000004")):
        check_output(run.settings.model_copy(update={"run": run.settings.run.model_copy(update={"resume": resume})}))


def test_a_run_goes_on_without_the_one_that_it_began_from(make_run: Any, tmp_path: Path) -> None:
    first = make_run(run__output=str(tmp_path / "first"))
    first.carry_out()
    run = make_run(run__init_from=str(first.folder), run__seed=8, run__steps=2)
    run.carry_out()
    shutil.rmtree(first.folder)
    changes = {"run__init_from": str(first.folder), "run__seed": 8, "run__steps": 3, "run__resume": "auto"}
    resumed = make_run(**changes)
    assert goes_on(resumed.settings)
    assert not goes_on(first.settings)
    resumed.carry_out()
    assert names(run) == ["step-00000002", "step-00000003"]


# -- trackers


class Broken:
    """Stands in for a tracker whose server is down."""

    def log(self, step: int, values: Any) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_left_out(
    make_recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard, "TensorBoard", lambda folder, recipe, start: Broken())
    tracker = open_tracker(tmp_path, make_recipe(tracking__tensorboard=True), 0)
    for step in (1, 2):
        tracker.log(step, {"loss/refl": 0.5})
    tracker.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    said = [line for line in capsys.readouterr().out.splitlines() if "tensorboard" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: tracking.tensorboard failed (no route to host) and is left out")


def test_wandb_goes_offline_where_its_server_is_not_there(make_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[Any] = []

    class Error(Exception):
        pass

    def init(**options: Any) -> Any:
        asked.append(options.get("mode"))
        if asked == [None]:
            raise Error("timed out")
        return SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error, __spec__="here"))
    tracker = open_tracker(tmp_path, make_recipe(tracking__wandb="project"), 0)
    assert asked == [None, "offline"]
    assert list(tracker.others) == ["tracking.wandb"]
    tracker.log(1, {"loss/refl": 0.5})
    tracker.close()
    assert list(tracker.others) == ["tracking.wandb"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_rows_wait_while_the_disk_is_full(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "metrics.jsonl")
    rows.add({"step": 1})
    rows.path = Path("/dev/full")
    rows.add({"step": 2})
    rows.add({"step": 3})
    assert [json.loads(line)["step"] for line in rows.waiting] == [2, 3]
    with pytest.raises(OSError, match="No space left"):
        rows.finish()
    rows.path = tmp_path / "metrics.jsonl"
    rows.add({"step": 4})
    assert rows.waiting == []
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_rows_that_wait_are_carried_by_the_checkpoint(make_run: Any, monkeypatch: Any, capsys: Any) -> None:
    """The run is killed before there is space for them; they come back, each once."""
    run = make_run(run__steps=3)

    def fill() -> None:
        run.tracker.rows.path = Path("/dev/full")

    during_step(run, 1, fill)
    run.carry_out()
    newest = run.folder / "checkpoints/step-00000003"
    verify("run.resume", newest)
    assert [row["step"] for row in read_metrics(newest)] == [2, 3]
    assert [row["step"] for row in read_metrics(run.folder)] == [1]
    assert [row["step"] for row in rules.logged_before(newest, 3)] == [1, 2, 3]
    for _ in range(2):
        again = make_run(run__steps=4, run__resume="auto")
        assert [row["step"] for row in again.history] == [1, 2, 3]
        again.open_folder()
        again.tracker.close()
        assert [row["step"] for row in read_metrics(run.folder)] == [1, 2, 3]


def test_lines_that_are_no_rows_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a machine that lost its power may leave."""
    bad = b'\0\0\0\n[1]\n{"loss": 1}\n{"step": "2"}\n{"step": 1, "loss": []}\n\xff\n'
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + bad + b'{"step": 2}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    rows = Rows(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.jsonl").read_bytes().count(bad) == 1
    rows.drop_after(2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    said = f"warning: 6 lines of {tmp_path}/metrics.jsonl cannot be read, and are removed\n"
    assert capsys.readouterr().err == said


def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/refl": NaN}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    rows = Rows(tmp_path / "metrics.jsonl")
    rows.drop_after(2)
    rows.add({"step": 3, "again": 1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1, "loss/refl": NaN}', '{"step": 2}', '{"step": 3, "again": 1}']
