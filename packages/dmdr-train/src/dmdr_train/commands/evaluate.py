"""`dmdr-train evaluate`: score the student of a run again, on one process."""

from pathlib import Path

import torch

from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.find import newest_verified
from dmdr_train.checkpoint.load import load_weights
from dmdr_train.checkpoint.manifest import RECIPE, STUDENT
from dmdr_train.commands.open_run import open_run
from dmdr_train.distributed.process_group import processes
from dmdr_train.evaluation.evaluator import Evaluator
from dmdr_train.reporting.student_export import sampling_settings
from dmdr_train.reporting.tables import print_table
from dmdr_train.training.networks import load_family, make_generator, open_decoder


def evaluate(folder: Path) -> None:
    """Score the student of a run's newest checkpoint and print the row; the evaluation is the recipe's."""
    settings = open_run(folder)
    if settings.tracking.evaluation is None:
        raise UserError("tracking.evaluation", f"is not set in {folder / RECIPE}; add a classifier and a reference")
    source = newest_verified("run", str(folder))
    with processes(torch.device("cpu")):
        family = load_family(settings)
        open_decoder(settings, family)
        network = make_generator(settings, family)
        load_weights("run", source / STUDENT, network)
        evaluator = Evaluator(settings.tracking.evaluation, family, torch.device("cpu"))
        sampling = sampling_settings(settings, family)
        row = evaluator.model("student", network, sampling["steps"], sampling["method"], shift=sampling["shift"])
    print_table({"student": row})
