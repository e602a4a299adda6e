"""`dmdr-train run`, and run.py: train.

Recipe and files are checked before torch is imported, so that a mistake is reported at once.
"""

import argparse
import json
import os

from dmdr_train.commands.recipe_options import add_recipe_options

HELP = "train, as run.py does"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    add_recipe_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, take a step of each stage, write nothing"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in run.output, which must exist; for another, run.resume=FOLDER",
    )


def command(options: argparse.Namespace) -> None:
    """Read and check the recipe, then train. Signals end the program with an exit code at any time."""
    from dmdr_train.distributed.signals import signals_end

    with signals_end():
        check_and_run(options)


def check_and_run(options: argparse.Namespace) -> None:
    """Print the recipe, take the first steps of a dry run, or train, as the options say."""
    from dmdr_train.recipe.load import dump_recipe
    from dmdr_train.run.python_api import dry_run, load_recipe, train

    settings = load_recipe(options.config, *options.overrides)
    if options.resume:
        output = os.path.join(".", settings.run.output)  # not one of the words that run.resume knows
        settings = load_recipe(options.config, *options.overrides, f"run.resume={json.dumps(output)}")
    if options.print_config:
        print(dump_recipe(settings), end="")
    elif options.dry_run:
        logs = dry_run(settings)
        if int(os.environ.get("RANK", "0")) == 0:
            for name, value in logs.items():
                print(f"{name} {value:.6g}")
            print("dry run: everything was built and each stage took a step; nothing was written")
    else:
        train(settings)
