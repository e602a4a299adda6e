"""A study and its runs, which a file of docs/evidence keeps."""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from dmdr_train.base.atomic_files import write_whole
from dmdr_train.evaluation.scores import read_scores
from dmdr_train.tracking.metrics_file import read_metrics
from pydantic import BaseModel, TypeAdapter
from sweeping import training_seconds

STUDIES = Path(__file__).parent
RECORDS = Path(__file__).parents[2] / "docs/evidence"
MEASURES = {"FD": "frechet", "precision": "precision", "recall": "recall", "accuracy": "accuracy"}
DIGITS = 6


class Study(BaseModel, extra="forbid"):
    """A file of tools/ablations.

    Attributes:
        recipe: a built-in recipe.
        stages: keys of evaluation.json, in order. A variant shows those that it has.
        overrides: of the recipe, for every variant.
        variants: further overrides by the name of the variant.
        first: overrides of a run whose end all variants of a seed start from, in place of `overrides`.
        over_time: logged values that are followed over the steps, by their titles.
    """

    recipe: str
    stages: list[str]
    overrides: list[str] = []
    variants: dict[str, list[str]]
    first: list[str] | None = None
    over_time: dict[str, str] = {}


class Run(BaseModel, extra="forbid"):
    """A complete run of a variant.

    Attributes:
        scores: FD, precision, recall and accuracy by stage.
        seconds: of the training.
        over_time: the logged values of the study by title and step.
    """

    variant: str
    seed: int
    scores: dict[str, dict[str, float]]
    seconds: float
    over_time: dict[str, dict[int, float]] = {}


Runs = dict[str, list[Run]]
"""The runs of each variant, in the order of the seeds."""


def read_study(name: str) -> Study:
    return Study(**yaml.safe_load((STUDIES / f"{name}.yaml").read_text(encoding="utf-8")))


def study_names() -> list[str]:
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def folder_name(variant: str, seed: int) -> str:
    return f"{variant.replace(' ', '-').replace(',', '')}-seed-{seed}"


def read_runs(study: Study, folder: Path, variants: Sequence[str], seeds: Sequence[int]) -> Runs:
    """Read the complete runs under a study's folder."""
    found = {(name, seed): folder / folder_name(name, seed) for name in variants for seed in seeds}
    complete = {key: path for key, path in found.items() if (path / "seconds.json").exists()}
    return {name: [_read_run(study, *key, complete[key]) for key in complete if key[0] == name] for name in variants}


def _read_run(study: Study, variant: str, seed: int, folder: Path) -> Run:
    scores = read_scores(folder)
    measured = {
        stage: {title: round(getattr(scores[stage], name), DIGITS) for title, name in MEASURES.items()}
        for stage in study.stages
        if stage in scores
    }
    rows = read_metrics(folder) if study.over_time else []
    over_time = {
        title: {row["step"]: round(row[key], DIGITS) for row in rows if key in row}
        for title, key in study.over_time.items()
    }
    return Run(
        variant=variant, seed=seed, scores=measured, seconds=round(training_seconds(folder)), over_time=over_time
    )


def read_record(name: str) -> list[Run]:
    """The runs of a study that docs/evidence holds."""
    path = RECORDS / f"{name}.json"
    return TypeAdapter(list[Run]).validate_json(path.read_bytes()) if path.exists() else []


def add_to_record(name: str, runs: Runs) -> None:
    """Keep runs in docs/evidence, in place of older ones of the same variant and seed."""
    order = list(read_study(name).variants)
    kept = {(run.variant, run.seed): run for run in read_record(name)}
    kept |= {(run.variant, run.seed): run for each in runs.values() for run in each}
    ordered = sorted(kept.values(), key=lambda run: (order.index(run.variant), run.seed))
    lines = ",\n".join(json.dumps(run.model_dump(exclude_defaults=True)) for run in ordered)
    RECORDS.mkdir(exist_ok=True)
    write_whole(RECORDS / f"{name}.json", lambda path: path.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))
