"""`dmdr-train init`: what it asks, what it writes, and that it fits."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from dmdr_train.base.errors import UserError
from dmdr_train.cli import main
from dmdr_train.commands import init
from dmdr_train.planning import first_recipe
from dmdr_train.planning.first_recipe import BASES, Hardware, changed, divisors, fit, layers, text
from dmdr_train.planning.gpus import find_gpu
from dmdr_train.recipe import shipped
from dmdr_train.recipe.load import load_recipe

HERE = Hardware(find_gpu("H100"), 2, None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["init", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("one_process")
def test_it_writes_a_recipe_for_a_model_and_says_what_it_takes(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["init", "--family", "sit", "--model", str(model), "--gpus", "3", "-o", "mine/first.yaml", "run.steps=70"])
    said = capsys.readouterr().out
    assert said.startswith("Wrote mine/first.yaml, planned for 3 x H100 with 80 GB:\n  memory: ")
    assert "it fits\n" in said
    recipe = load_recipe("mine/first.yaml")
    assert (recipe.model.path, recipe.run.output, recipe.run.steps) == (str(model), "runs/first", 70)
    assert (recipe.optim.batch_size, recipe.optim.accumulation) == (513, 1)  # 512, for three GPUs
    comments = [line for line in Path("mine/first.yaml").read_text().splitlines() if line.startswith("#")]
    assert f"#           {said.splitlines()[1].strip()}" in comments


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.yaml").write_text("mine")
    given = ("--family", "sd3", "--model", "models/sd3-medium")
    for arguments, line in (
        (("-o", "there.yaml"), "error: --output: there.yaml already exists; give a new file\n"),
        ((), "error: --family: is required where there is no terminal to ask on; give it\n"),
        (given[:2], "error: --model: is required where there is no terminal to ask on; give it\n"),
        (
            (*given, "--objective", "refl"),
            "error: --init-from: refl continues a run; give its folder, or --objective jo",
        ),
        (
            (*given, "--objective", "regression"),
            "error: --objective: regression has no recipe for sd3; give distribution",
        ),
        ((*given, "optim.accumulation=3"), "error: optim.accumulation: is what init chooses; change it in the file"),
        (("--family", "sit", "--model", "a", "--prompts", "b"), "error: --prompts: a model of classes has none; leave"),
        ((*given, "--gpu", "H10"), "error: --gpu: no GPU 'H10' in the table"),
    ):
        assert refused(capsys, *arguments).startswith(line)
    assert [path.name for path in folder.iterdir()] == ["there.yaml"]


def test_it_asks_for_what_is_not_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers: Iterator[str] = iter(["flux", "sdxl", "", "models/mine", "", "none", "2", ""])
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    options = SimpleNamespace(family=None, model=None, objective=None, gpus=None, gpu_memory=None)
    init.ask(options)  # type: ignore[arg-type]
    assert vars(options) == {
        "family": "sdxl",
        "model": "models/mine",
        "objective": "distribution_matching",
        "gpus": 2,
        "gpu_memory": None,
    }
    assert capsys.readouterr().out.splitlines()[0] == "  give one of sit, sd3, sdxl"


def test_an_input_that_ends_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    with pytest.raises(UserError, match=r"^--gpu-memory: has no answer; give it"):
        init.answer("gpu_memory", "GB of each GPU", "80", str)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Plans whose GB are given: of the recipe as it is, per sample at once, and what means of saving save."""
    size = {"weights": 60.0, "sample": 4.0, "zero": 0.0, "eight_bit": 0.0}

    def taken(recipe: Any, costs: Any, accumulation: int, world: int) -> int:
        samples = recipe.optim.batch_size // world // accumulation
        total = size["weights"] + size["sample"] * samples
        saved = size["zero"] * (recipe.optim.zero_stage > 0) + size["eight_bit"] * recipe.optim.eight_bit
        return int((total - saved) * 1e9)

    monkeypatch.setattr(first_recipe, "costs_of", lambda recipe: None)
    monkeypatch.setattr(first_recipe, "taken", taken)
    return size


def data(**optim: Any) -> dict[str, Any]:
    found = changed("sit-xl-2-cold-start", ["optim.batch_size=16", "optim.zero_stage=0", "optim.eight_bit=false"])
    found["optim"] |= {"accumulation": 1, **optim}
    found["memory"] = {"gradient_checkpointing": "auto"}
    return found


def test_the_smallest_accumulation_that_fits_is_taken(sizes: dict[str, float]) -> None:
    assert fit(data(), HERE)["optim"]["accumulation"] == 4  # two samples at once take 68 of 68.4 GB
    sizes["sample"] = 1.0
    assert fit(data(), HERE)["optim"]["accumulation"] == 1


def test_means_of_saving_memory_come_only_where_they_are_needed(sizes: dict[str, float]) -> None:
    assert "zero_stage" not in fit(data(zero_stage=2), HERE)["memory"]
    sizes |= {"weights": 90.0, "zero": 10.0, "eight_bit": 20.0}
    found = fit(data(), HERE)["optim"]
    assert (found["zero_stage"], found["eight_bit"], found["accumulation"]) == (2, True, 4)
    sizes["zero"] = 30.0
    found = fit(data(), HERE)["optim"]
    assert (found["zero_stage"], found["eight_bit"]) == (2, False)


def test_what_never_fits_is_said(sizes: dict[str, float]) -> None:
    sizes["weights"] = 500.0
    with pytest.raises(UserError, match=r"^--gpu-memory: this needs 589 GB on each GPU at least; give larger GPUs"):
        fit(data(), HERE)


def test_a_large_sd3_has_recipes_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"num_layers": 38}')
    assert layers(str(tmp_path)) == layers("models/sd35-large") == 38
    assert layers("models/sd3-medium") == 24
    assert layers("models/unknown") == 0
    assert {name for each in BASES.values() for name in each.values()} <= set(shipped.names())
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_the_text_is_the_recipe_with_what_it_needs() -> None:
    plan: Any = SimpleNamespace(gpus=2, gpu=find_gpu("L40S"), capacity=0.95 * 48e9)
    plan.memory, plan.fits, plan.checkpointing, plan.nodes, plan.hours = (
        SimpleNamespace(total=2**30),
        True,
        None,
        1,
        2.0,
    )
    plan.stages, plan.cost, plan.unknown = [], None, []
    written = text(data(eight_bit=True), "sit-xl-2-cold-start", plan)
    assert yaml.safe_load(written) == data(eight_bit=True)
    assert "# Needs:    2 x L40S with 48 GB, pip install dmdr-train[eight-bit], and the files" in written
