"""`dmdr-train evaluate | export | report`: what can be done with a run's folder afterwards, on one process."""

from pathlib import Path

import torch
from dmdr_models.describe import STATE_DICTS

from dmdr_train.base.errors import UserError, naming
from dmdr_train.base.folders import check_writable
from dmdr_train.checkpoint.find import newest_verified
from dmdr_train.checkpoint.load import load_weights
from dmdr_train.checkpoint.manifest import RECIPE, STUDENT
from dmdr_train.distributed.process_group import processes
from dmdr_train.evaluation.evaluator import Evaluator, read_scores
from dmdr_train.recipe.load import parse_recipe, read_yaml
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.report import draw_curves, print_table
from dmdr_train.reporting.student_export import export_state_dict, export_student, sampling_settings
from dmdr_train.training.networks import load_family, make_generator


def open_run(folder: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        UserError: the folder holds no run.
    """
    if not (folder / RECIPE).is_file():
        raise UserError("run", f"{folder} holds no {RECIPE}; give the folder of a run")
    return parse_recipe(read_yaml(folder / RECIPE))


def evaluate(folder: Path) -> None:
    """Score the student of a run's newest checkpoint and print the row; the evaluation is the recipe's."""
    settings = open_run(folder)
    if settings.tracking.evaluation is None:
        raise UserError("tracking.evaluation", f"is not set in {folder / RECIPE}; add a classifier and a reference")
    source = newest_verified("run", str(folder))
    with processes(torch.device("cpu")):
        family = load_family(settings)
        network = make_generator(settings, family)
        load_weights("run", source / STUDENT, network)
        evaluator = Evaluator(settings.tracking.evaluation, family, torch.device("cpu"))
        sampling = sampling_settings(settings, family)
        row = evaluator.model("student", network, sampling["steps"], sampling["method"], shift=sampling["shift"])
    print_table({"student": row})


def export(folder: Path, output: Path) -> None:
    """Write the student of the newest checkpoint: a folder, or where `output` ends so, a file with its state dict."""
    settings = open_run(folder)
    if output.exists():
        raise UserError("--output", f"{output} already exists; give a new folder or file")
    check_writable("--output", output.parent)
    source = newest_verified("run", str(folder))
    if output.suffix in STATE_DICTS:
        export_state_dict(output, settings, source)
    else:
        export_student(output, settings, source, read_scores(folder))
    print(f"Wrote {output}, from {source}")


def report(folder: Path) -> None:
    """Draw curves.png and print the table again."""
    settings = open_run(folder)
    with naming("run"):
        draw_curves(folder, settings)
    scores = read_scores(folder)
    if scores:
        print_table(scores)
    print(f"Wrote {folder}/curves.png")
