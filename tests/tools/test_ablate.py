"""tools/ablate.py: its studies are recipes that exist, and its tables hold what the runs wrote."""

import json
from pathlib import Path

import ablate
import pytest
import yaml
from dmdr_train.evaluation.scores import Scores, save_scores
from dmdr_train.recipe.load import load_recipe

STUDIES = sorted(path.stem for path in ablate.STUDIES.glob("*.yaml"))


def read(name: str) -> ablate.Study:
    return ablate.Study(**yaml.safe_load((ablate.STUDIES / f"{name}.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_is_a_recipe_with_a_stage_that_the_study_shows(name: str, tmp_path: Path) -> None:
    study = read(name)
    start = []
    if study.first is not None:
        load_recipe(study.recipe, [ablate.NO_TEACHER, *study.first])
        start = [f"run.init_from={tmp_path}"]
    for variant, changes in study.variants.items():
        recipe = load_recipe(study.recipe, [ablate.NO_TEACHER, *start, *study.overrides, *changes])
        assert list(recipe.stages)[-1] in study.stages, variant


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, list[Path]]:
    """Two seeds of a variant with two stages, and one of a variant with the first alone."""
    runs: dict[str, list[Path]] = {"both": [], "first alone": []}
    for name, seed, stages in (("both", 0, 2), ("both", 1, 2), ("first alone", 0, 1)):
        folder = tmp_path / ablate.folder_name(name, seed)
        folder.mkdir()
        scores = {
            stage: Scores(stage, 1.0 + seed + k, 0.5, 0.25, 0.75, 0.1) for k, stage in enumerate(["a", "b"][:stages])
        }
        save_scores(folder, scores)
        (folder / "seconds.json").write_text('{"train": 60}')
        rows = [{"step": step, "value": step * (seed + 1.0)} for step in (10, 20, 30)] + [{"step": 35}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs[name].append(folder)
    return runs


def test_a_row_per_stage_that_a_variant_has(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    study = ablate.Study(recipe="demo", stages=["a", "b"], variants={name: [] for name in runs})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ablate.table(study, runs).splitlines()[2:]]
    assert [(row[0], row[1], row[2], row[3], row[-1]) for row in rows] == [
        ("both", "2", "a", "1.500 [1.000, 2.000]", "–"),
        ("both", "2", "b", "2.500 [2.000, 3.000]", "60 [60, 60]"),
        ("first alone", "1", "a", "1.000", "60"),
    ]
    ablate.figure(study, runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_values_over_the_steps(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    study = ablate.Study(recipe="demo", stages=[], variants={}, over_time={"name": "value"})
    assert ablate.table_over_time(study, runs, columns=2).splitlines() == [
        "| variant | value | step 10 | step 30 |",
        "|---|---|---:|---:|",
        "| both | name | 15.000 | 45.000 |",
        "| first alone | name | 10.000 | 30.000 |",
    ]
    ablate.figure_over_time(study, runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_variants_continue_the_first_run_of_their_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, list[str]] = {}

    def train(recipe: str, folder: Path, seed: int, overrides: list[str], processes: int, port: int) -> None:
        made[folder.name] = overrides

    monkeypatch.setattr(ablate, "train", train)
    given = ["--seeds", "0", "1", "--variants", "reward alone", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["ablate.py", "scenes_regularisers", *given])
    ablate.main()
    study = read("scenes_regularisers")
    assert study.first is not None
    assert made.keys() == {"first-seed-0", "first-seed-1", "reward-alone-seed-0", "reward-alone-seed-1"}
    assert made["first-seed-1"] == [ablate.NO_TEACHER, *study.first]
    start = f"run.init_from={tmp_path / 'scenes_regularisers/first-seed-1'}"
    own = study.variants["reward alone"]
    assert made["reward-alone-seed-1"] == [ablate.NO_TEACHER, start, *study.overrides, *own]
