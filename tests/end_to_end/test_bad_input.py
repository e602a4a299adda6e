"""A user's mistake quickly gives exit code 2 and one line with key, value and fix, and nothing is written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def prepare_nothing(folder: Path) -> None:
    pass


def without_file(name: str) -> Callable[[Path], None]:
    """Make a copy of the model, `broken`, without one of its files."""

    def prepare(folder: Path) -> None:
        shutil.copytree(folder / "sit", folder / "broken")
        (folder / "broken" / name).unlink()

    return prepare


def cut_weights(folder: Path) -> None:
    shutil.copytree(folder / "sit", folder / "broken")
    weights = folder / "broken/transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def a_file(folder: Path) -> None:
    (folder / "file").write_text("no folder")


def an_old_run(folder: Path) -> None:
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out/recipe.yaml").write_text("model: {}")


def a_student(folder: Path) -> None:
    """Put a file of the user where the run would write its own."""
    (folder / "out/student").mkdir(parents=True)


def a_run_without_checkpoints(folder: Path) -> None:
    an_old_run(folder)
    a_student(folder)


def a_link_to_nowhere(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/checkpoints").symlink_to("unmounted")


def a_closed_folder(folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o500)


def code_as_weights(folder: Path) -> None:
    """Make a reward's folder whose weights are a pickle."""
    shutil.copytree(folder / "classifier", folder / "pickled")
    (folder / "pickled/model.safetensors").unlink()
    torch.save({}, folder / "pickled/pytorch_model.bin")


REWARD = "objectives.1.reward"

# Name, arguments, parts of the line, and preparation. These mistakes are found before torch is imported:
EARLY: dict[str, tuple[list[str], list[str], Callable[[Path], None]]] = {
    "unknown section": (["optimizer={}"], ["optimizer: unknown key; did you mean optim?"], prepare_nothing),
    "misspelt key": (["run.step=3"], ["run.step: unknown key; did you mean run.steps?"], prepare_nothing),
    "wrong type": (["run.steps=soon"], ["run.steps", "integer", "'soon'"], prepare_nothing),
    "truth for a number": (["run.seed=true"], ["run.seed: should be a number, got True"], prepare_nothing),
    "truth in a list": (["objectives.1.weight=true"], ["objectives.1.weight", "number", "True"], prepare_nothing),
    "a position that is none": (["objectives.\u00b2.weight=1"], ["objectives.\u00b2.weight"], prepare_nothing),
    "a time beyond all": (["run.timeout=1e30"], ["run.timeout", "less than or equal"], prepare_nothing),
    "no output": (["run.output=''"], ["run.output", "at least 1 character"], prepare_nothing),
    "an output of a long name": ([f"run.output={'x' * 300}"], ["run.output", "File name too long"], prepare_nothing),
    "out of range": (["optim.ema=1.5"], ["optim.ema", "less than 1", "1.5"], prepare_nothing),
    "no distillation": (["objectives.0.kind=refl"], ["objectives.0.reward: is required"], prepare_nothing),
    "start never reached": (["objectives.1.start=5"], ["objectives.1.start", "5", "run.steps 5"], prepare_nothing),
    "unknown option": (["--presicion=1"], ["unrecognized arguments: --presicion=1", "--help"], prepare_nothing),
    "no weights": (["model.path=./nowhere"], ["model.path", "no model folder ./nowhere"], prepare_nothing),
    "another model": (["model.path=classifier"], ["model.path", "classifier"], prepare_nothing),
    "no config": (["model.path=broken"], ["model.path", "config.json"], without_file("transformer/config.json")),
    "no VAE": (["model.path=broken"], ["model.path", "vae"], without_file("vae/config.json")),
    "no generator": (["model.generator=none"], ["model.generator", "no model folder none"], prepare_nothing),
    "LoRA on no layer": (
        ["model.fake_score_lora.targets=[to_q, to_w]"],
        ["model.fake_score_lora.targets", "'to_w'", "did you mean to_"],
        prepare_nothing,
    ),
    "generator LoRA on no layer": (
        ["model.generator_lora={targets: [blocks]}"],
        ["model.generator_lora.targets", "'blocks'", "valid are"],
        prepare_nothing,
    ),
    "class out of range": (["data.classes=[3, 10]"], ["data.classes", "10", "0 to 9"], prepare_nothing),
    "no class": (["data.classes=[]"], ["data.classes", "empty", "all"], prepare_nothing),
    "no reward": ([f"{REWARD}.checkpoint=gone"], [f"{REWARD}.checkpoint", "'gone'"], prepare_nothing),
    "no init": (["run.init_from=gone"], ["run.init_from", "'gone'"], prepare_nothing),
    "no evaluation classifier": (
        ["tracking.evaluation={classifier: gone, reference: shapes}"],
        ["tracking.evaluation.classifier", "'gone'"],
        prepare_nothing,
    ),
    "reference without classes": (
        ["tracking.evaluation={classifier: classifier, reference: classifier}"],
        ["tracking.evaluation.reference", "classifier has 0 sub-folders", "10 classes"],
        prepare_nothing,
    ),
    "batch that cannot be split": (
        ["optim.batch_size=6", "optim.accumulation=4"],
        ["optim.batch_size", "6", "multiple of 4, such as 8"],
        prepare_nothing,
    ),
    "output is a file": (["run.output=file/out"], ["run.output", "file", "is a file"], a_file),
    "output taken": ([], ["run.output", "out already holds a run", "run.resume=auto"], an_old_run),
    "output with a student": ([], ["run.output", "out already holds a run"], a_student),
    "output without checkpoints": (
        ["run.resume=auto"],
        ["run.output", "out holds what a run leaves, but no checkpoint"],
        a_run_without_checkpoints,
    ),
    "output without its disk": (["run.resume=auto"], ["run.output", "checkpoints is no folder"], a_link_to_nowhere),
    "resume misspelt": (["run.resume=Auto"], ["run.resume", "Auto holds no checkpoint"], an_old_run),
    "output that no one can write": (["run.output=/proc/dmdr"], ["run.output", "/proc", "another"], prepare_nothing),
    "output without permission": (["run.output=closed/out"], ["run.output", "closed", "another"], a_closed_folder),
}

# These mistakes are found when the files are opened:
LATE: dict[str, tuple[list[str], list[str], Callable[[Path], None]]] = {
    "nothing to resume": (["--resume"], ["run.resume", "out holds no checkpoint"], prepare_nothing),
    "fp16 on a CPU": (["optim.precision=fp16"], ["optim.precision", "fp16", "fp32 or bf16"], prepare_nothing),
    "no weights in the folder": (
        ["model.path=broken"],
        ["model.path", "broken"],
        without_file("transformer/diffusion_pytorch_model.safetensors"),
    ),
    "damaged weights": (["model.path=broken"], ["model.path", "broken"], cut_weights),
    "no VAE weights": (
        ["model.path=broken"],
        ["model.path", "broken"],
        without_file("vae/diffusion_pytorch_model.safetensors"),
    ),
    "unknown reward": ([f"{REWARD}.name=class-labels"], [REWARD, "'class-labels'", "'class-label'"], prepare_nothing),
    "unknown reward option": ([f"{REWARD}.options={{size: 3}}"], [REWARD, "size"], prepare_nothing),
    "reward of another kind": ([f"{REWARD}.checkpoint=dinov2"], [REWARD, "dinov2", "config.json"], prepare_nothing),
    "reward as a pickle": ([f"{REWARD}.checkpoint=pickled"], [REWARD, "pickled", "safetensors"], code_as_weights),
    "reward of fewer classes": ([f"{REWARD}.checkpoint=few"], [REWARD, "few", "4 classes", "10"], prepare_nothing),
    "evaluation by no classifier": (
        ["tracking.evaluation={classifier: sit, reference: shapes, pictures: 100}"],
        ["tracking.evaluation", "sit"],
        prepare_nothing,
    ),
}


def assert_refused(workshop: Any, said: list[str], *arguments: str, **launched: Any) -> Any:
    before = workshop.snapshot()
    outcome = workshop.run(*arguments, **launched)
    assert set(outcome.codes) == {2}, outcome.stderr[-3000:]
    assert len(outcome.errors) == 1, outcome.stderr[-3000:]
    assert all(part in outcome.errors[0] for part in said), outcome.errors[0]
    assert "Traceback" not in outcome.stderr, outcome.stderr[-3000:]
    assert workshop.snapshot() == before
    return outcome


PROGRAM = """
import contextlib, io, json, os, sys
from dmdr_train.cli import run_main

for folder, arguments in json.load(sys.stdin):
    os.chdir(folder)
    code = None
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            run_main(["--config", "recipe.yaml", *arguments])
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, said.getvalue(), sorted({"torch", "transformers", "datasets"} & set(sys.modules))]))
"""


def is_one(mistake: str) -> bool:
    if mistake == "output without permission":
        return os.geteuid() != 0
    return mistake != "output that no one can write" or Path("/proc/self").exists()


@pytest.fixture(scope="module")
def early(open_workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Any], list[Any]]]:
    """Run each case of EARLY in its own folder, all in one new interpreter; and list the folders before and after."""
    workshops = {mistake: open_workshop(tmp_path_factory.mktemp("early")) for mistake in EARLY if is_one(mistake)}
    for mistake, workshop in workshops.items():
        workshop.write()
        EARLY[mistake][2](workshop.folder)
    before = [workshop.snapshot() for workshop in workshops.values()]
    tasks = json.dumps([(str(workshop.folder), EARLY[mistake][0]) for mistake, workshop in workshops.items()])
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=tasks, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line) for line in done.stdout.splitlines()]
    after = [workshop.snapshot() for workshop in workshops.values()]
    return {mistake: (line, [b, a]) for mistake, line, b, a in zip(workshops, said, before, after, strict=True)}


@pytest.mark.parametrize("mistake", EARLY)
def test_seen_before_torch_is_imported(early: Any, mistake: str) -> None:
    if not is_one(mistake):
        pytest.skip("root may write anywhere, or there is no /proc here")
    (code, text, heavy), (before, after) = early[mistake]
    assert code == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert all(part in text for part in EARLY[mistake][1]), text
    assert heavy == []
    assert after == before


@pytest.mark.parametrize("mistake", LATE)
def test_seen_before_anything_is_written(workshop: Any, mistake: str) -> None:
    arguments, said, prepare = LATE[mistake]
    prepare(workshop.folder)
    assert_refused(workshop, said, *arguments)


@pytest.mark.parametrize(("name", "said"), [("dmeo", "did you mean demo?"), ("gone.yaml", "give a file, or one of")])
def test_no_such_recipe(workshop: Any, name: str, said: str) -> None:
    assert_refused(workshop, ["--config", name, said], config=name)


def test_no_recipe_at_all(workshop: Any) -> None:
    outcome = workshop.execute(str(Path(__file__).parents[2] / "packages/dmdr-train/run.py"))
    assert outcome.code == 2
    assert outcome.errors == ["run.py: the following arguments are required: --config; see --help"]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("run.init_from", ["model.path", "is wider", "was trained on other weights; give that run's, sit"]),
        ("run.resume", ["model.path", "is wider here and sit in", "with other contents; set it back"]),
    ],
)
def test_a_checkpoint_of_another_model(finished: Any, workshop: Any, key: str, said: list[str]) -> None:
    assert_refused(workshop, said, f"{key}={finished[0].folder / 'out'}", "model.path=wider")


def test_a_checkpoint_of_another_recipe(finished: Any, workshop: Any) -> None:
    run = finished[0].folder / "out"
    assert_refused(workshop, ["guidance.ratio", "is 3 here and 2 in"], f"run.resume={run}", "guidance.ratio=3")


@pytest.mark.parametrize(
    ("arguments", "started", "said"),
    [
        (["optim.accumulation=1"], {"WORLD_SIZE": "3"}, ["optim.batch_size", "4", "3 processes", "such as 6"]),
        (["run.stepps=3"], {"processes": 2}, ["run.stepps: unknown key; did you mean run.steps?"]),
        ([f"{REWARD}.name=class-labels"], {"processes": 2}, [REWARD, "'class-labels'"]),
    ],
    ids=["more processes than the batch allows", "misspelt key", "unknown reward"],
)
def test_in_a_group(workshop: Any, arguments: list[str], started: dict[str, Any], said: list[str]) -> None:
    assert_refused(workshop, said, *arguments, **started)
