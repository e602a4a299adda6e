"""docs/evidence.md shows what docs/evidence holds, in the tables of tools/ablate.py."""

import re
from pathlib import Path

import pytest
from ablations.study import MEASURES, RECORDS, Runs, Study, read_record, read_study
from ablations.tables import table, table_over_time

PAGE = Path(__file__).parents[2] / "docs/evidence.md"
COMMAND = re.compile(r"tools/ablate\.py (\w+)")
RECORDED = sorted(path.stem for path in RECORDS.glob("*.json"))


def sections_with(study: str) -> list[str]:
    """The texts between two headings that show a study, and no study without a record."""
    parts = re.split(r"^#+ .*\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = [(set(COMMAND.findall(part)), part) for part in parts]
    return [part for names, part in shown if study in names and names <= set(RECORDED)]


def runs_of(name: str) -> tuple[Study, Runs]:
    study, record = read_study(name), read_record(name)
    return study, {variant: [run for run in record if run.variant == variant] for variant in study.variants}


def rows(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of a Markdown table by their titles, for each variant and stage."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    titles: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells[:1] == ["variant"]:
            titles = cells
        elif "after" in titles and cells and not cells[0].startswith("-"):
            row = dict(zip(titles, cells, strict=True))
            found[row["variant"], row["after"]] = row
        elif not cells:
            titles = []
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_the_tables_of_the_page_are_those_of_the_runs(name: str) -> None:
    """Of the page's columns, those that are measures, and of the runs' rows, those that the page shows."""
    shown = [row for section in sections_with(name) for row in rows(section).items()]
    studies = {study for section in sections_with(name) for study in COMMAND.findall(section)}
    given = {key: row for study in studies for key, row in rows(table(*runs_of(study))).items()}
    assert shown, "the page does not show the study"
    for key, row in shown:
        measures = [title for title in MEASURES if title in row]
        assert measures
        assert {title: row[title] for title in measures} == {title: given[key][title] for title in measures}, key


@pytest.mark.parametrize("name", [name for name in RECORDED if read_study(name).over_time])
def test_values_over_the_steps_are_those_of_the_runs(name: str) -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    study, runs = runs_of(name)
    printed = table_over_time(study, {variant: each for variant, each in runs.items() if each}).splitlines()
    assert set(printed) <= set(lines)


@pytest.mark.parametrize("name", RECORDED)
def test_the_seeds_of_each_variant_begin_at_0_without_a_gap(name: str) -> None:
    _, runs = runs_of(name)
    seeds = [[run.seed for run in each] for each in runs.values()]
    assert all(each == list(range(len(each))) for each in seeds), seeds
    assert sum(map(len, seeds)) == len(read_record(name)), "a variant that the study does not have"
