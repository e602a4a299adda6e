"""`dmdr-train evaluate`: score the student of a run again, on one process."""

import argparse
from pathlib import Path

HELP = "score the student of a run again"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the run")


def command(options: argparse.Namespace) -> None:
    evaluate(Path(options.run))


def evaluate(folder: Path) -> None:
    """Score the student of a run's newest checkpoint, as the recipe's `tracking.evaluation` says, and print its row.

    Raises:
        UserError: the folder holds no run or no undamaged checkpoint, or its recipe has no evaluation.
    """
    import torch

    from dmdr_train.base.errors import UserError
    from dmdr_train.checkpoint.find import newest_verified
    from dmdr_train.checkpoint.load import load_weights
    from dmdr_train.checkpoint.manifest import RECIPE, STUDENT
    from dmdr_train.commands.open_run import open_run
    from dmdr_train.distributed.process_group import processes
    from dmdr_train.evaluation.evaluator import Evaluator
    from dmdr_train.evaluation.seeded_sampling import student_plan
    from dmdr_train.reporting.tables import print_table
    from dmdr_train.training.networks import load_family, make_generator

    settings = open_run(folder)
    if settings.tracking.evaluation is None:
        raise UserError("tracking.evaluation", f"is not set in {folder / RECIPE}; add a classifier and a reference")
    source = newest_verified("run", str(folder))
    with processes(torch.device("cpu")):
        family = load_family(settings)
        network = make_generator(settings, family)
        load_weights("run", source / STUDENT, network)
        evaluator = Evaluator(settings.tracking.evaluation, family, torch.device("cpu"))
        row = evaluator.model("student", network, student_plan(settings))
    print_table({"student": row})
