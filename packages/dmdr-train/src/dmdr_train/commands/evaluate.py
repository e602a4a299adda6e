"""`dmdr-train evaluate`: score teacher, checkpoints and student of a run, on its recipe's device.

Under a launcher the processes share the pictures: `torchrun --nproc-per-node 8 -m dmdr_train evaluate RUN`.
"""

import argparse
import os
import sys
from pathlib import Path

HELP = "score teacher, checkpoints and student of a run"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    from dmdr_train.run.python_api import ROWS

    parser.add_argument("run", help="folder of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of tracking.evaluation, such as its prompt_files"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="what to score; all of it by default")


def command(options: argparse.Namespace) -> None:
    """Score the rows, print their table, and write the report anew.

    The same command goes on from where it was interrupted.
    """
    from dmdr_train.distributed.signals import signals_end
    from dmdr_train.reporting.report import refresh_report
    from dmdr_train.reporting.tables import print_table
    from dmdr_train.run.python_api import evaluate, open_run

    with signals_end():
        scores = evaluate(options.run, *options.overrides, rows=options.rows)
    if int(os.environ.get("RANK", "0")) == 0:
        print_table(scores)
        print(f"Wrote {options.run}/evaluation/: evaluation.json, evaluation.md, recipe.yaml")
        warning = refresh_report(Path(options.run), open_run(options.run))
        if warning:
            print(warning, file=sys.stderr)
        else:
            print(f"Wrote {options.run}/report.html")
