"""`dmdr-train report`: draw the curves of a run again, and print its table. Imports no torch."""

import argparse
from pathlib import Path

HELP = "draw curves.png of a run again, and print its table"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the run")


def command(options: argparse.Namespace) -> None:
    """Draw curves.png and print the table again."""
    from dmdr_train.base.errors import naming
    from dmdr_train.evaluation.scores import read_scores
    from dmdr_train.reporting.curves import draw_curves
    from dmdr_train.reporting.tables import print_table
    from dmdr_train.run.python_api import open_run

    folder = Path(options.run)
    settings = open_run(folder)
    with naming("run"):
        draw_curves(folder, settings)
    scores = read_scores(folder)
    if scores:
        print_table(scores)
    print(f"Wrote {folder}/curves.png")
