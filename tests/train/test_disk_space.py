"""What a run will need of its disk, against what it then writes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.find import checkpoints_in
from dmdr_train.checkpoint.retention import prune
from dmdr_train.checkpoint.save import Saving, save_student
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.recipe.schema import Recipe, Run
from dmdr_train.reporting.student_export import export_student
from dmdr_train.run import disk_space, runner
from dmdr_train.run.build import build
from dmdr_train.run.disk_space import Space, checkpoints_at_once, moment_bytes, space, student_bytes

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 4}
GB = 10**9


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: SimpleNamespace(free=size))


@pytest.mark.parametrize("changes", [{"optim__ema": 0.5}, {"model__generator_lora": LORA}], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
)
def test_the_size_of_a_checkpoint(
    make_recipe: Callable[..., Recipe], model: Path, tmp_path: Path, stage: int, precision: str, changes: dict[str, Any]
) -> None:
    """It is known before the first step, and at most as much too large as names and headers are."""
    basis = {"model__path": str(model), "guidance__ratio": 1, "optim__batch_size": 2, "optim__zero_stage": stage}
    settings = make_recipe(**basis, optim__precision=precision, run__output=str(tmp_path), **changes)
    trainer = build(settings, CPU)
    average = Average(trainer.generator, settings.optim.ema)
    expected = space(settings, trainer).checkpoint
    trainer.train_step()
    written = Saving(tmp_path / "checkpoints", settings, trainer, average).finish()
    size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    # The least that could be forgotten is a copy of the network in bf16: 101 kB.
    assert 0 <= expected - size < 100_000


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_size_of_the_student(make_recipe: Any, model: Path, tmp_path: Path, lora: Any) -> None:
    settings = make_recipe(model__path=str(model), model__generator_lora=lora, run__output=str(tmp_path))
    trainer = build(settings, CPU)
    average = Average(trainer.generator, None)
    save_student(tmp_path / "weights", trainer, average)
    export_student(tmp_path / "student", settings, tmp_path / "weights")
    size = sum(path.stat().st_size for path in (tmp_path / "student/transformer").iterdir())
    assert size == pytest.approx(student_bytes(trainer.generator.module, trainer.family.students.keeps_lora), rel=0.05)


def test_a_lora_that_stays_one_is_a_small_student(make_recipe: Any, sd3: Path, prompts: Path) -> None:
    settings = make_recipe(
        model={"family": "sd3", "path": str(sd3), "generator_lora": LORA, "fake_score_lora": LORA},
        data__prompts=str(prompts),
    )
    trainer = build(settings, CPU)
    generator = trainer.generator.module
    assert student_bytes(generator, True) == 3 * 4 * sum(p.numel() for p in generator.parameters() if p.requires_grad)
    assert student_bytes(generator, False) > 4 * sum(p.numel() for p in generator.base.parameters()) - 1


def test_moments_in_eight_bits() -> None:
    assert [moment_bytes(size, False) for size in (10, 4096)] == [80, 32768]
    assert moment_bytes(4095, True) == 8 * 4095
    assert moment_bytes(4096, True) == 2 * (4096 + 16 * 4 + 256 * 4)
    assert moment_bytes(10**8 + 1, True) == pytest.approx(2 * 10**8, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "step", "found", "most", "left"),
    [
        ({"steps": 10}, 0, [], 1, 1),
        ({"steps": 10, "checkpoint_every": 2}, 0, [], 3, 2),
        ({"steps": 11, "checkpoint_every": 2, "keep_last": 1}, 0, [], 2, 1),
        ({"steps": 5, "checkpoint_every": 2, "keep_last": 9}, 0, [], 3, 3),
        ({"steps": 12, "checkpoint_every": 2, "keep_last": 1, "keep_every": 4}, 0, [], 4, 3),
        ({"steps": 13, "checkpoint_every": 2, "keep_last": 1, "keep_every": 4}, 0, [], 4, 4),
        ({"steps": 10, "checkpoint_every": 2}, 10, [8, 10], 2, 2),
        ({"steps": 10, "checkpoint_every": 2}, 6, [4, 6], 3, 2),
        ({"steps": 10, "checkpoint_every": 2, "keep_last": 1}, 5, [2, 4, 5], 4, 1),
        ({"steps": 10, "checkpoint_every": 2, "keep_last": 9}, 2, [2, 4, 6], 5, 5),
    ],
)
def test_how_many_checkpoints_are_there_at_once(
    tmp_path: Path, changes: dict[str, int], step: int, found: list[int], most: int, left: int
) -> None:
    """As many as a run leaves that writes and removes them."""
    run = Run.model_validate({"output": "out", **changes})
    assert checkpoints_at_once(run, step, found) == (most, left)
    for number in found:
        (tmp_path / f"step-{number:08d}").mkdir()
    counts = [len(found)]
    every = run.checkpoint_every or run.steps
    for number in range(step + 1, run.steps + 1):
        if number % every == 0 or number == run.steps:
            counts.append(len(list(tmp_path.iterdir())) + 1)
            (tmp_path / f"step-{number:08d}").mkdir(exist_ok=True)
            prune(tmp_path, number, run.keep_last, run.keep_every, None)
    assert (max(counts), len(checkpoints_in(tmp_path))) == (most, left)


def test_the_best_is_one_more() -> None:
    run = Run.model_validate({"output": "out", "steps": 10, "checkpoint_every": 2, "keep_best": "diversity"})
    assert checkpoints_at_once(run, 0) == (4, 3)


def test_a_disk_that_is_too_small_is_refused() -> None:
    Space(Path("out"), 3 * GB, 3, 10 * GB, 10 * GB).check()
    with pytest.raises(UserError) as caught:
        Space(Path("out"), 3 * GB, 3, 10 * GB, 10 * GB - 1).check()
    assert str(caught.value) == (
        "run.output: out is on a disk that is too small: a checkpoint takes 3 GB, up to 3 are there at once (9 GB); "
        "with the student, the run needs 10 GB, and 10 GB are free; make space, give another run.output, or keep fewer "
        "(run.keep_last, run.keep_every)"
    )


def test_a_run_is_refused_before_its_first_step(
    make_recipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves nothing behind; a dry run says the numbers."""
    settings = make_recipe(model__path=str(model), optim__batch_size=2, run__output=str(tmp_path / "out"))
    free(monkeypatch, 1_000_000)
    with pytest.raises(UserError, match=r"^run.output: .* 0.001 GB are free; make space, give another run.output, or "):
        runner.run(settings)
    assert list(tmp_path.iterdir()) == []
    runner.dry_run(settings)
    assert "a checkpoint takes 0.00" in capsys.readouterr().err


def test_what_is_there_counts(make_recipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of an earlier session take no space a second time, and what it left half done will go."""
    settings = make_recipe(model__path=str(model), run__output=str(tmp_path), run__checkpoint_every=2)
    trainer = build(settings, CPU)
    free(monkeypatch, GB)
    first = space(settings, trainer)
    student = student_bytes(trainer.generator.module, False)
    assert (first.most, first.needed, first.free) == (3, max(3 * first.checkpoint, 2 * first.checkpoint + student), GB)
    for name in ("step-00000004", "step-00000006", ".step-00000008.partial"):
        (tmp_path / "checkpoints" / name / "generator").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "generator/file").write_bytes(b"\0" * 1000)
    trainer.step = 6
    later = space(settings, trainer)
    assert (later.most, later.needed, later.free) == (3, max(first.checkpoint, student), GB + 1000)
