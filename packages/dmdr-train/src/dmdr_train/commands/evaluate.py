"""`dmdr-train evaluate`: score the student of a run again, on one process."""

import argparse

HELP = "score the student of a run again"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the run")


def command(options: argparse.Namespace) -> None:
    """Score the student of the newest checkpoint, and print its row."""
    from dmdr_train.reporting.tables import print_table
    from dmdr_train.run.python_api import evaluate

    print_table({"student": evaluate(options.run)})
