"""Which checkpoints stay, two runs in one folder, runs that go on elsewhere, and trackers that fail."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dmdr_train.base.errors import StoppedError, UserError
from dmdr_train.checkpoint.find import checkpoints_in
from dmdr_train.checkpoint.manifest import verify
from dmdr_train.checkpoint.retention import prune, remove_leftovers
from dmdr_train.distributed.collectives import agreed
from dmdr_train.distributed.run_lock import check_free, hold
from dmdr_train.evaluation.scores import read_scores
from dmdr_train.monitoring import rules
from dmdr_train.run.preflight import check_output, goes_on
from dmdr_train.run.runner import locked
from dmdr_train.run.saving import best_step
from dmdr_train.tracking import tensorboard
from dmdr_train.tracking.metrics_file import Rows, read_metrics
from dmdr_train.tracking.run_tracker import open_tracker

pytestmark = pytest.mark.usefixtures("one_process")


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
def test_a_run_goes_on_in_another_folder_with_all_its_rows(make_run: Any, tmp_path: Path, during_step: Any) -> None:
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


def test_a_run_goes_on_without_the_one_that_it_began_from(make_run: Any, tmp_path: Path, names: Any) -> None:
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


def test_rows_that_wait_are_carried_by_the_checkpoint(
    make_run: Any, monkeypatch: Any, capsys: Any, during_step: Any
) -> None:
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
