"""tools/ablate.py: its studies are recipes that exist, and its tables hold what the runs wrote."""

import json
from pathlib import Path

import ablate
import pytest
from ablations import figures, study
from ablations.study import Run, Runs, Study, read_runs, read_study
from ablations.tables import table, table_over_time
from dmdr_train.evaluation.scores import Scores, save_scores
from dmdr_train.recipe.load import load_recipe

STUDY = Study(recipe="demo", stages=["a", "b"], variants={"both": [], "first alone": []}, over_time={"name": "value"})


@pytest.mark.parametrize("name", study.study_names())
def test_every_variant_is_a_recipe_with_a_stage_that_the_study_shows(name: str, tmp_path: Path) -> None:
    given = read_study(name)
    start = []
    if given.first is not None:
        load_recipe(given.recipe, [ablate.NO_TEACHER, *given.first])
        start = [f"run.init_from={tmp_path}"]
    for variant, changes in given.variants.items():
        recipe = load_recipe(given.recipe, [ablate.NO_TEACHER, *start, *given.overrides, *changes])
        assert list(recipe.stages)[-1] in given.stages, variant


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Two seeds of a variant with two stages, and one of a variant with the first alone; a third is not complete."""
    for name, seed, stages in (("both", 0, 2), ("both", 1, 2), ("first alone", 0, 1), ("first alone", 1, 1)):
        folder = tmp_path / study.folder_name(name, seed)
        folder.mkdir()
        scores = {
            stage: Scores(stage, 1.0 + seed + k, 0.5, 0.25, 0.75, 0.1) for k, stage in enumerate(["a", "b"][:stages])
        }
        save_scores(folder, scores)
        if (name, seed) != ("first alone", 1):
            (folder / "seconds.json").write_text('{"train": 60}')
        rows = [{"step": step, "value": step * (seed + 1.0)} for step in (10, 20, 30)] + [{"step": 35}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_runs(STUDY, tmp_path, list(STUDY.variants), [0, 1, 2])


def test_a_row_per_stage_that_a_variant_has(runs: Runs, tmp_path: Path) -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(STUDY, runs).splitlines()]
    others = ["0.500 [0.500, 0.500]", "0.250 [0.250, 0.250]", "0.750 [0.750, 0.750]"]
    assert rows[0] == ["variant", "seeds", "after", "FD", "precision", "recall", "accuracy", "training, s"]
    assert rows[2:] == [
        ["both", "2", "a", "1.500 [1.000, 2.000]", *others, "–"],
        ["both", "2", "b", "2.500 [2.000, 3.000]", *others, "60 [60, 60]"],
        ["first alone", "1", "a", "1.000", "0.500", "0.250", "0.750", "60"],
    ]
    figures.fidelity_and_diversity(STUDY, runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_values_over_the_steps(runs: Runs, tmp_path: Path) -> None:
    assert table_over_time(STUDY, runs, columns=2).splitlines() == [
        "| variant | value | step 10 | step 30 |",
        "|---|---|---:|---:|",
        "| both | name | 15.000 | 45.000 |",
        "| first alone | name | 10.000 | 30.000 |",
    ]
    figures.over_time(STUDY, runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_a_record_gains_runs_and_replaces_older_ones(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RECORDS", tmp_path / "evidence")
    monkeypatch.setattr(study, "read_study", {"name": STUDY}.get)
    assert study.read_record("name") == []
    older = Run(variant="both", seed=1, scores={}, seconds=1)
    study.add_to_record("name", {"first alone": runs["first alone"], "both": [older]})
    study.add_to_record("name", {"both": runs["both"]})
    assert study.read_record("name") == [*runs["both"], *runs["first alone"]]


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a study, whose records are in a folder of the test; training is a failure."""
    monkeypatch.setattr(study, "RECORDS", tmp_path / "evidence")
    monkeypatch.setattr(study, "read_study", lambda name: STUDY)
    monkeypatch.setattr(ablate, "read_study", lambda name: STUDY)
    monkeypatch.setattr(ablate, "train", lambda *given: pytest.fail("it trains"))
    return "shapes_dynamics"


def ran(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The rows that tools/ablate.py prints, by variant and seeds."""
    monkeypatch.setattr("sys.argv", ["ablate.py", *words])
    ablate.main()
    printed = capsys.readouterr().out.split("\n\n")[0]
    return [" ".join(cell.strip() for cell in line.split("|")[1:4]) for line in printed.splitlines()[2:]]


def test_runs_are_recorded_and_shown_without_training(
    runs: Runs, recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / recorded).mkdir()
    for folder in tmp_path.glob("*-seed-*"):
        folder.rename(tmp_path / recorded / folder.name)
    output = ("--output", str(tmp_path))
    assert ran(monkeypatch, capsys, recorded, *output, "--show") == ["both 2 a", "both 2 b", "first alone 1 a"]
    with pytest.raises(SystemExit):
        ran(monkeypatch, capsys, recorded, *output, "--recorded")
    assert "there is no such run in" in capsys.readouterr().err
    assert len(ran(monkeypatch, capsys, recorded, *output, "--record")) == 3
    none = ("--output", str(tmp_path / "none"))
    assert ran(monkeypatch, capsys, recorded, *none, "--recorded", "--variants", "both") == ["both 2 a", "both 2 b"]
    assert ran(monkeypatch, capsys, recorded, *none, "--recorded", "--seeds", "1")[0] == "both 1 a"
    with pytest.raises(SystemExit):
        ran(monkeypatch, capsys, recorded, *none, "--record")
    assert study.read_record(recorded) == [*runs["both"], *runs["first alone"]]


def test_variants_continue_the_first_run_of_their_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[str]] = {}

    def train(recipe: str, folder: Path, seed: int, overrides: list[str], processes: int, port: int) -> None:
        made[folder.name] = overrides

    monkeypatch.setattr(ablate, "train", train)
    given = ["--seeds", "0", "1", "--variants", "reward alone", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["ablate.py", "scenes_regularisers", *given])
    with pytest.raises(SystemExit):  # the runs of this test leave nothing to show
        ablate.main()
    given_study = read_study("scenes_regularisers")
    assert given_study.first is not None
    assert made.keys() == {"first-seed-0", "first-seed-1", "reward-alone-seed-0", "reward-alone-seed-1"}
    assert made["first-seed-1"] == [ablate.NO_TEACHER, *given_study.first]
    start = f"run.init_from={tmp_path / 'scenes_regularisers/first-seed-1'}"
    own = given_study.variants["reward alone"]
    assert made["reward-alone-seed-1"] == [ablate.NO_TEACHER, start, *given_study.overrides, *own]
