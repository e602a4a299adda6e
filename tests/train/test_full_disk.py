"""A disk that is full, and checkpoints that are written in the background: the old one stays whole."""

import errno
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_models
import pytest
import torch
from dmdr_train.base.errors import StoppedError
from dmdr_train.checkpoint import save
from dmdr_train.checkpoint.background_writes import Unhurried
from dmdr_train.checkpoint.manifest import read_manifest, verify
from dmdr_train.tracking.metrics_file import read_metrics

pytestmark = pytest.mark.usefixtures("one_process")


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
    make_run: Any, full_disk: list[bool], capsys: pytest.CaptureFixture[str], names: Any, during_step: Any
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
def test_the_student_outlives_a_last_checkpoint_without_space(
    make_run: Any, full_disk: Any, stage: int, names: Any, during_step: Any
) -> None:
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


def test_samples_wait_for_space_and_the_report_is_written_when_it_can(
    make_run: Any, monkeypatch: Any, names: Any
) -> None:
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


def test_no_run_fails_for_its_page(make_run: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def mistake(*_: Any) -> None:
        raise KeyError("a mistake\nof ours")

    monkeypatch.setattr("dmdr_train.reporting.report.render", mistake)
    run = make_run(run__steps=1)
    del run.finish
    run.carry_out()
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("warning: ")] == [
        f"warning: {run.folder}/report.html could not be written ('a mistake\\nof ours'); "
        f"to try again: dmdr-train report {run.folder}"
    ]
    assert f"Wrote {run.folder}/: summary.md, " in said
    assert not (run.folder / "report.html").exists()


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


def trained(run: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.trainer.generator.module.parameters()]


@pytest.mark.bits
def test_training_goes_on_while_a_checkpoint_is_written(
    make_run: Any, tmp_path: Path, monkeypatch: Any, names: Any, during_step: Any
) -> None:
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


def test_what_goes_wrong_in_the_background_is_said(
    make_run: Any, full_disk: Any, capsys: Any, names: Any, during_step: Any
) -> None:
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
