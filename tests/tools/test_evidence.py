"""docs/evidence.md shows what docs/evidence holds, in the tables of tools/ablate.py."""

import re
from pathlib import Path

import pytest
from ablations.study import RECORDS, Runs, Study, read_record, read_study
from ablations.tables import table, table_over_time

PAGE = Path(__file__).parents[2] / "docs/evidence.md"
MEAN = re.compile(r"\d+\.\d{3} \[\d+\.\d{3}, \d+\.\d{3}\]")
RECORDED = sorted(path.stem for path in RECORDS.glob("*.json"))


def sections_with(study: str) -> list[str]:
    """The texts between two headings that show a study, and no study without a record."""
    parts = re.split(r"^#+ .*\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = [(set(re.findall(r"tools/ablate\.py (\w+)", part)), part) for part in parts]
    return [part for names, part in shown if study in names and names <= set(RECORDED)]


def runs_of(name: str) -> tuple[Study, Runs]:
    study, record = read_study(name), read_record(name)
    return study, {variant: [run for run in record if run.variant == variant] for variant in study.variants}


@pytest.mark.parametrize("name", RECORDED)
def test_every_mean_beside_a_recorded_study_is_what_its_runs_give(name: str) -> None:
    sections = sections_with(name)
    studies = {study for section in sections for study in re.findall(r"tools/ablate\.py (\w+)", section)}
    given = {cell for study in studies for cell in MEAN.findall(table(*runs_of(study)))}
    shown = {cell for section in sections for cell in MEAN.findall(section)}
    assert shown, "the page does not show the study"
    assert shown <= given, shown - given


@pytest.mark.parametrize("name", [name for name in RECORDED if read_study(name).over_time])
def test_values_over_the_steps_are_those_of_the_runs(name: str) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    study, runs = runs_of(name)
    printed = table_over_time(study, {variant: each for variant, each in runs.items() if each}).splitlines()
    assert set(printed[2:]) <= set(lines)


@pytest.mark.parametrize("name", RECORDED)
def test_runs_of_a_variant_have_the_same_seeds(name: str) -> None:
    """And a study has each of its runs once."""
    _, runs = runs_of(name)
    seeds = {variant: [run.seed for run in each] for variant, each in runs.items() if each}
    assert all(each == list(range(len(each))) for each in seeds.values()), seeds
    assert sum(map(len, seeds.values())) == len(read_record(name))
