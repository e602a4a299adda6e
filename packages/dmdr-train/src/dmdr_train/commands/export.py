"""`dmdr-train export`: write the student of a run as a folder or as one file."""

import argparse
from pathlib import Path

HELP = "write the student of a run's newest checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the run")
    parser.add_argument(
        "-o", "--output", required=True, help="folder, or .safetensors or .bin file of a state dict, to write"
    )


def command(options: argparse.Namespace) -> None:
    export(Path(options.run), Path(options.output))


def export(folder: Path, output: Path) -> None:
    """Write the student of the newest checkpoint: as a file if `output` has the suffix of one, otherwise as a folder.

    Raises:
        UserError: the folder holds no run or no undamaged checkpoint, or `output` exists or cannot be written.
    """
    from dmdr_models.describe import STATE_DICTS

    from dmdr_train.base.errors import UserError
    from dmdr_train.base.folders import check_writable
    from dmdr_train.checkpoint.find import newest_verified
    from dmdr_train.commands.open_run import open_run
    from dmdr_train.evaluation.scores import read_scores

    settings = open_run(folder)
    if output.exists():
        raise UserError("--output", f"{output} already exists; give a new folder or file")
    check_writable("--output", output.parent)
    source = newest_verified("run", str(folder))

    from dmdr_train.reporting.student_export import export_state_dict, export_student

    if output.suffix in STATE_DICTS:
        export_state_dict(output, settings, source)
    else:
        export_student(output, settings, source, read_scores(folder))
    print(f"Wrote {output}, from {source}")
