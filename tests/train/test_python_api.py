"""`import dmdr_train`: what the command line does, from Python."""

import inspect
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_train
import pytest
import yaml
from dmdr_train.evaluation.scores import read_scores

DOOR = ("check", "evaluate", "export", "load_recipe", "train")


class Diary(dmdr_train.Callback):
    def __init__(self) -> None:
        self.notes: list[Any] = []

    def log(self, step: int, values: Any) -> None:
        self.notes.append(("log", step, "loss/distribution_matching" in values))

    def picture(self, step: int, name: str, image: Any) -> None:
        self.notes.append(("picture", step, name, image.size))

    def checkpoint(self, step: int, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        self.notes.append(("checkpoint", step, folder.name))

    def close(self) -> None:
        self.notes.append(("close",))


class Broken(dmdr_train.Callback):
    def log(self, step: int, values: Any) -> None:
        raise RuntimeError("no ink")


@pytest.fixture
def recipe(
    make_recipe_dict: Callable[..., dict[str, Any]],
    model: Path,
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.chdir(tmp_path)
    evaluation = {"classifier": str(classifier), "reference": "shapes", "pictures": 100, "teacher_steps": [1]}
    tracking = {"log_every": 1, "tensorboard": False, "samples": {"count": 2}, "evaluation": evaluation}
    data = make_recipe_dict(model__path=str(model), tracking=tracking, watch={"every": 0}, run__steps=4)
    data["run"]["checkpoint_every"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "recipe.yaml"


@pytest.mark.usefixtures("one_process")
def test_train_evaluate_and_export(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = dmdr_train.load_recipe(recipe, "run.steps=3", "optim.ema=0.5")
    assert (settings.run.steps, settings.optim.ema) == (3, 0.5)
    diary = Diary()
    student = dmdr_train.train(settings, callbacks=[diary, Broken()])
    assert student == Path("out/student")
    assert (student / "dmdr.json").is_file()
    rows = [note for note in diary.notes if note[0] == "log"]
    assert rows == [("log", step, True) for step in (1, 2, 3)]
    assert [note for note in diary.notes if note[0] == "checkpoint"] == [
        ("checkpoint", 2, "step-00000002"), ("checkpoint", 3, "step-00000003")
    ]  # fmt: skip
    assert {note[2] for note in diary.notes if note[0] == "picture"} == {"teacher-1", "student-cold_start"}
    assert diary.notes[-1] == ("close",)
    assert "warning: callbacks[1] (Broken) failed (no ink) and is left out from here on" in capsys.readouterr().out

    scores = dmdr_train.evaluate("out")
    assert list(scores) == ["real", "teacher-1", "step-2", "student"]
    assert scores["student"].frechet == pytest.approx(read_scores(Path("out"))["cold_start"].frechet, rel=1e-4)
    Path("out/evaluation.json").unlink()  # as of a run that has no evaluation of its own
    dmdr_train.export("out", tmp_path / "student")
    assert "student at step 3" in (tmp_path / "student/README.md").read_text()  # the scores of `evaluate`
    source = dmdr_train.export("out", tmp_path / "student.safetensors")
    assert source.name == "step-00000003"
    assert (tmp_path / "student.safetensors").is_file()
    for place, layout, message in (
        ("a.safetensors", "comfy", "comfy is unknown; give one of diffusers, original"),
        ("a.bin", "original", "original is for a file; give --output a name that ends in .safetensors"),
        ("a.safetensors", "original", "the family sit has no original layout; use diffusers"),
    ):
        with pytest.raises(dmdr_train.UserError, match=f"^--layout: {message}"):
            dmdr_train.export("out", tmp_path / place, layout)


def test_mistakes_are_raised_and_not_printed(recipe: Path) -> None:
    with pytest.raises(dmdr_train.UserError, match=r"^run.stps: unknown key; did you mean run.steps\?"):
        dmdr_train.load_recipe(recipe, "run.stps=3")
    wrong = dmdr_train.load_recipe(recipe, "optim.accumulation=3")
    for function in (dmdr_train.check, dmdr_train.train):
        with pytest.raises(dmdr_train.UserError, match=r"^optim.batch_size: 4 cannot be split over 1 processes"):
            function(wrong)
    assert not Path("out").exists()
    for call in (lambda: dmdr_train.evaluate("nowhere"), lambda: dmdr_train.export("nowhere", "student")):
        with pytest.raises(dmdr_train.UserError, match=r"^run: nowhere holds no recipe.yaml; give the folder of a run"):
            call()


@pytest.mark.parametrize("name", DOOR)
def test_the_door_is_typed_and_documented(name: str) -> None:
    function = getattr(dmdr_train, name)
    hints = typing.get_type_hints(function)
    assert hints.keys() == {*inspect.signature(function).parameters, "return"}
    assert function.__doc__
    assert name in dmdr_train.__all__


def test_the_door_opens_at_once() -> None:
    program = "import sys, dmdr_train; dmdr_train.load_recipe('demo'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
