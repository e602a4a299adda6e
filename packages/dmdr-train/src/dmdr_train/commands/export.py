"""`dmdr-train export`: write the student of a run as a folder or as one file."""

from pathlib import Path

from dmdr_models.folder.checks import STATE_DICTS

from dmdr_train.base.errors import UserError
from dmdr_train.base.folders import check_writable
from dmdr_train.checkpoint.find import newest_verified
from dmdr_train.commands.open_run import open_run
from dmdr_train.evaluation.scores import read_scores
from dmdr_train.reporting.student_export import export_state_dict, export_student


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
