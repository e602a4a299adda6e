"""`dmdr-train report`: a page about a run, its curves and its table. Imports no torch."""

import argparse
from pathlib import Path

HELP = "write a page about a run, draw its curves again, and print its table"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("run", help="folder of the run")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="REPORT.html",
        help="write the page here, and nothing to the run's folder (default: RUN/report.html, and RUN/curves.png)",
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="runs to compare it with, in the page")


def command(options: argparse.Namespace) -> None:
    """Write the page, draw curves.png and print the table."""
    from dmdr_train.base.errors import UserError, naming
    from dmdr_train.base.folders import check_writable
    from dmdr_train.evaluation.scores import all_scores
    from dmdr_train.reporting.curves import draw_curves
    from dmdr_train.reporting.report import write_report
    from dmdr_train.reporting.tables import print_table
    from dmdr_train.run.python_api import open_run

    folder, page = Path(options.run), options.output
    runs = [(Path(run), open_run(run)) for run in (options.run, *options.compare)]
    if page is not None:
        if page.suffix.lower() not in (".html", ".htm"):
            raise UserError("--output", f"{page} does not end in .html; give a name that does")
        check_writable("--output", page.absolute().parent)
    with naming("run" if page is None else "--output"):
        write_report(page or folder / "report.html", runs)
        if page is None:
            draw_curves(folder, runs[0][1])
    for title, scores in all_scores(folder).items():
        print_table(scores, title)
    print(f"Wrote {page}" if page else f"Wrote {folder}/report.html and {folder}/curves.png")
