"""What a run leaves to read: the table, summary.md and curves.png."""

from pathlib import Path

from dmdr_train.evaluation.evaluator import Scores
from dmdr_train.monitoring import rules
from dmdr_train.recipe import schema
from dmdr_train.tracking.trackers import read_metrics

COLUMNS = {
    "frechet": "FD",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "inception": "IS",
    "frechet_pixels": "FD pixels",
}


def columns(scores: dict[str, Scores]) -> list[str]:
    """The headings: what was measured, then what reference and rewards added."""
    first = next(iter(scores.values()))
    known = [title for name, title in COLUMNS.items() if getattr(first, name) is not None]
    return [*known, *first.more]


def cells(scores: Scores) -> list[str]:
    values = [value for name in COLUMNS if (value := getattr(scores, name)) is not None]
    return [f"{value:.{1 if value >= 10 else 3}f}" for value in (*values, *scores.more.values())]


def markdown_table(scores: dict[str, Scores]) -> str:
    lines = [
        "| pictures | " + " | ".join(columns(scores)) + " |",
        "|---|" + "---:|" * len(columns(scores)),
        *(f"| {row.name} | " + " | ".join(cells(row)) + " |" for row in scores.values()),
    ]
    return "\n".join(lines)


def print_table(scores: dict[str, Scores]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("pictures", *columns(scores), title="evaluation by a classifier that no reward uses")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in scores.values():
        table.add_row(row.name, *cells(row))
    Console(width=130).print(table)


def write_summary(folder: Path, settings: schema.Recipe, scores: dict[str, Scores], usage: str) -> None:
    """summary.md: the table, how it was measured, the pictures, and how to go on."""
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
            f"Over {evaluation.pictures} pictures. FD, precision and recall are taken with "
            f"`{Path(evaluation.classifier).name}`, which no reward uses; FD pixels on pictures averaged to 8 x 8.",
            "",
            "![before and after](before_after.png)",
            "",
        ]
    lines += [*early_warning(folder, settings), "![curves](curves.png)", "", usage, ""]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")


def early_warning(folder: Path, settings: schema.Recipe) -> list[str]:
    """What was seen at the first and at the last evaluation, and what the rules said; nothing without evaluations."""
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
        *([f"- {alarm}" for alarm in alarms] or [f"None of {len(settings.rules)} rules had anything to say."]),
        "",
    ]


def _places(found: list[rules.Row], name: str) -> list[tuple[rules.Row, str]]:
    return [(found[-1], f"teacher/{name}"), (found[0], name), (found[-1], name)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def draw_curves(folder: Path, settings: schema.Recipe) -> None:
    """curves.png: every logged loss and reward over the steps, with the ends of the stages marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    stage_ending = {end: stage.replace("_", " ") for stage, end in settings.stages.items()}
    drawn = ("loss/", "reward/", "teacher_", *(f"{rules.PREFIX}{name}" for name in settings.watched if "/" not in name))
    drawn = (*drawn, *(f"{rules.PREFIX}{kind}/" for kind in ("trained", "held_out", "drift", "past_margin")))
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if n.startswith(drawn)]
    if not names:
        return
    wide = min(4, len(names))
    tall = -(-len(names) // wide)
    figure, axes = plt.subplots(tall, wide, figsize=(4 * wide, 3 * tall), layout="constrained", squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), color="#3b6ea5")
        axis.set(title=name, xlabel="step", xlim=(0, settings.run.steps))
        for end in list(settings.stages.values())[:-1]:
            axis.axvline(end, color="#c44e52", linestyle=":", label=f"end of {stage_ending[end]}")
        axis.grid(alpha=0.3)
    if len(settings.stages) > 1:
        axes[0][0].legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
