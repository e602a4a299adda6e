"""summary.md: the scores of a run, and the alarms of early warning."""

from pathlib import Path

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.evaluation.scores import Scores
from dmdr_train.monitoring import rules
from dmdr_train.recipe import schema
from dmdr_train.reporting.tables import markdown_table
from dmdr_train.tracking.metrics_file import read_metrics

INTERVALS = "In brackets are 95% confidence intervals of means."


def write_summary(folder: Path, settings: schema.Recipe, scores: dict[str, Scores], usage: str) -> None:
    """Write summary.md: the table of scores, how they were measured, the pictures, early warning, and the usage."""
    lines = [
        f"# {folder.name}",
        "",
        f"{settings.run.steps} steps, seed {settings.run.seed}, batch {settings.optim.batch_size}: "
        f"a {settings.rollout.steps}-step student of `{Path(settings.model.path).name}`.",
        "",
    ]
    if scores:
        evaluation = settings.tracking.evaluation
        assert evaluation is not None
        lines += [
            markdown_table(scores),
            "",
            how_measured(evaluation),
            "",
        ]
    lines += ["![before and after](before_after.png)", ""]
    lines += [*early_warning(folder, settings), "![curves](curves.png)", "", usage, ""]
    text = "\n".join(lines)
    write_whole(folder / "summary.md", lambda path: path.write_text(text, encoding="utf-8"))


def how_measured(evaluation: schema.Evaluation) -> str:
    """A paragraph on how the scores were measured."""
    if evaluation.prompt_files:
        names = ", ".join(Path(file).name for file in evaluation.prompt_files)
        text = f"Over at most {evaluation.pictures} pictures of the prompts in {names}."
    else:
        text = f"Over {evaluation.pictures} pictures."
    text += f" {INTERVALS}"
    if evaluation.reference is None:
        return text
    network = evaluation.features.name if evaluation.features else Path(str(evaluation.classifier)).name
    unused = "" if evaluation.features else ", which no reward uses"
    return (
        f"{text} FD, KID, precision, recall, density and coverage are taken with `{network}`{unused}; "
        f"FD pixels on pictures averaged to 8 x 8."
    )


def early_warning(folder: Path, settings: schema.Recipe) -> list[str]:
    """The lines on early warning: measures at the first and last evaluation, and alarms; empty without evaluations."""
    found = rules.evaluations(read_metrics(folder))
    if not found:
        return []
    names = [name for name in found[-1] if name in settings.watched and not name.startswith("teacher/")]
    alarms = rules.all_alarms(settings.rules, found)
    return [
        "## Early warning",
        "",
        f"| | teacher | step {found[0]['step']} | step {found[-1]['step']} |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | " + " | ".join(_number(row.get(key)) for row, key in _places(found, name)) + " |"
            for name in names
        ),
        "",
        *([f"- {alarm}" for alarm in alarms] or [no_alarm(settings)]),
        "",
    ]


def no_alarm(settings: schema.Recipe) -> str:
    """The line in the place of alarms if there are none."""
    count = len(settings.rules)
    return f"None of {count} rules gave an alarm." if count else "No rule of early warning was in force."


def _places(found: list[rules.Row], name: str) -> list[tuple[rules.Row, str]]:
    return [(found[-1], f"teacher/{name}"), (found[0], name), (found[-1], name)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
