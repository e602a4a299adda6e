"""`dmdr-train report`: draw the curves of a run again, and print its table. Imports no torch."""

import argparse
from pathlib import Path

from dmdr_train.base.errors import naming

HELP = "draw curves.png of a run again, and print its table"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the run")


def command(options: argparse.Namespace) -> None:
    report(Path(options.run))


def report(folder: Path) -> None:
    """Draw curves.png and print the table again.

    Raises:
        UserError: the folder holds no run, or cannot be written to.
    """
    from dmdr_train.commands.open_run import open_run
    from dmdr_train.evaluation.scores import read_scores
    from dmdr_train.reporting.curves import draw_curves
    from dmdr_train.reporting.tables import print_table

    settings = open_run(folder)
    with naming("run"):
        draw_curves(folder, settings)
    scores = read_scores(folder)
    if scores:
        print_table(scores)
    print(f"Wrote {folder}/curves.png")
