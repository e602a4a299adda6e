"""A stranger's package adds an objective, a model family, a tracker and a reward; no file of dmdr knows it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_core
import dmdr_models
import dmdr_rewards
import dmdr_train
import pytest
import torch
import yaml
from dmdr_models import tiny
from dmdr_train.evaluation.scores import read_scores
from dmdr_train.tracking.metrics_file import read_metrics
from PIL import Image

ROOT = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {
    "model": {"family": "pixels", "path": "teacher", "fake_score_lora": {"rank": 2, "alpha": 2}},
    "rollout": {"steps": 2},
    "objectives": [
        {"kind": "weighted_matching", "power": 1.0},
        {
            "kind": "refl",
            "weight": "auto",
            "ratio": 0.5,
            "start": 2,
            "margin": 1.0,
            "reward": {"name": "redness", "options": {"gain": 2.0}},
        },
    ],
    "guidance": {"ratio": 2, "dynamics": {"steps": 2}},
    "optim": {"batch_size": 4, "generator": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}, "ema": 0.5},
    "run": {"output": "out", "steps": 4, "checkpoint_every": 2},
    "tracking": {
        "log_every": 1,
        "tensorboard": False,
        "trackers": {"diary": {"file": "notes.txt"}},
        "samples": {"count": 3},
        "evaluation": {
            "classifier": "classifier", "reference": "shapes", "pictures": 100, "teacher_steps": [1], "rewards": True,
        },
    },
    "watch": {"every": 2, "prompts": 2, "pictures": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, installed: Path) -> Path:
    """A folder with a teacher of the stranger's family, a classifier and a recipe."""
    folder = tmp_path_factory.mktemp("plugins")
    program = "import torch; from pixel_plugins.family import PixelNetwork; torch.manual_seed(0); "
    program += "PixelNetwork(sample_size=32).save_pretrained('teacher/network')"
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder, env=environment)
    tiny.classifier(folder / "classifier")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture(scope="module")
def trained(workshop: Path, stranger: Callable[..., Any]) -> Path:
    run = str(ROOT / "packages/dmdr-train/run.py")
    stranger(run, "--config", "recipe.yaml", folder=workshop).check()
    return workshop / "out"


def test_it_is_trained(trained: Path) -> None:
    rows = read_metrics(trained)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in ("loss/weighted_matching", "largest_weight/weighted_matching", "loss/fake_score"):
        assert all(name in row for row in rows)
    assert rows[3]["weight/refl"] > 0, "the automatic weight follows the stranger's objective"
    assert {"reward/redness", "watch/trained/refl", "watch/fake_score_ratio"} <= rows[3].keys()
    assert list(read_scores(trained)) == ["cold_start", "joint", "real", "teacher-1"]
    assert "redness" in read_scores(trained)["joint"].more


def test_the_tracker_is_told_everything(trained: Path) -> None:
    notes = (trained / "notes.txt").read_text().splitlines()
    assert [note.partition(":")[0] for note in notes if note.endswith("values")] == [f"step {i}" for i in range(1, 5)]
    assert "step 2: the checkpoint step-00000002" in notes
    assert "step 4: the checkpoint step-00000004" in notes
    assert sum("the picture student-" in note for note in notes) == 2


def test_it_is_evaluated_exported_and_drawn_from(
    trained: Path, workshop: Path, stranger: Callable[..., Any], tmp_path: Path
) -> None:
    done = stranger("-m", "dmdr_train", "evaluate", "out", folder=workshop).check()
    assert "student" in done.stdout
    stranger("-m", "dmdr_train", "export", "out", "-o", str(tmp_path / "student"), folder=workshop).check()
    said = json.loads((tmp_path / "student/dmdr.json").read_text())
    assert (said["family"], said["steps"], said["method"]) == ("pixels", 2, "sde")
    draw = ("-m", "dmdr_models.generate", "--classes", "3,7", "--per-class", "2")
    for student, name in ((tmp_path / "student", "a.png"), (trained / "student", "b.png")):
        stranger(*draw, "--model", str(student), "-o", str(tmp_path / name), folder=workshop).check()
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "b.png") as second:
        assert first.size == second.size
        assert first.tobytes() == second.tobytes()
        assert len(set(first.getdata())) > 10


def test_a_resumed_run_equals_the_uninterrupted_one(
    trained: Path, workshop: Path, stranger: Callable[..., Any]
) -> None:
    run = str(ROOT / "packages/dmdr-train/run.py")
    resumed = ("run.output=again", f"run.resume={trained}/checkpoints/step-00000002")
    stranger(run, "--config", "recipe.yaml", *resumed, folder=workshop).check()
    ours, theirs = (folder / "checkpoints/step-00000004" for folder in (trained, workshop / "again"))
    for name in ("generator.safetensors", "fake_score.safetensors", "student.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_its_keys_are_shown_and_its_mistakes_named(workshop: Path, stranger: Callable[..., Any]) -> None:
    run = (str(ROOT / "packages/dmdr-train/run.py"), "--config", "recipe.yaml", "--print-config")
    shown = yaml.safe_load(stranger(*run, folder=workshop).check().stdout)
    assert shown["objectives"][0] == {
        "kind": "weighted_matching", "weight": 1.0, "start": 0, "stop": None, "ramp": 0, "power": 1.0,
    }  # fmt: skip
    for change, said in {
        "objectives.0.powr=2": "objectives.0.powr: unknown key; did you mean objectives.0.power?",
        "objectives.0.power=-1": "objectives.0.power: should be greater than or equal to 0, got -1",
        "objectives.0.kind=weighted_maching": "did you mean weighted_matching?",
        "model.family=pixel": "did you mean pixels?",
        "tracking.trackers={diary: {fle: a}}": "tracking.trackers.diary.fle: unknown key; did you mean file?",
        "objectives.1.reward.name=rednes": "did you mean 'redness'?",
        "objectives.1.reward.options={gian: 2}": "gian",
    }.items():
        done = stranger(*run[:-1], change, "run.output=new", folder=workshop)
        assert done.code == 2, change
        (line,) = done.errors
        assert said in line
        assert not (workshop / "new").exists()


@pytest.mark.parametrize("package", [dmdr_core, dmdr_rewards, dmdr_models, dmdr_train])
def test_no_file_of_dmdr_knows_it(package: Any) -> None:
    folder = Path(package.__file__).parent
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".yaml", ".toml"):
            source = path.read_text(encoding="utf-8")
            assert not any(name in source for name in ("weighted_matching", "pixel_plugins", "redness", "Diary"))


def test_the_weight_of_a_sample_is_its_distance(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(installed)
    from pixel_plugins.matching import WeightedMatching, WeightedMatchingSection

    section = WeightedMatchingSection(kind="weighted_matching", power=2.0)
    x0 = torch.zeros(2, 1, 2, 2, requires_grad=True)
    real, fake = torch.ones(2, 1, 2, 2), torch.stack([torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 4.0)])

    class Guide:
        renoise = staticmethod(lambda sample: None)
        real = staticmethod(lambda sample, at: real)
        fake = staticmethod(lambda sample, at: fake)

    sample: Any = type("Sample", (), {"x0": x0})
    loss, values = WeightedMatching(section, "weighted_matching")(sample, Guide())
    loss.backward()
    weight = torch.tensor([1.0, 9.0]) / 5.0  # distances of 1 and 3, squared, over their mean
    expected = weight.reshape(-1, 1, 1, 1) * (fake - real) / x0.numel()
    torch.testing.assert_close(x0.grad, expected)
    assert values == {"largest_weight/weighted_matching": pytest.approx(1.8)}
