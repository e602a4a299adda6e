"""What a run leaves to read: the table, summary.md and curves.png."""

from pathlib import Path

from dmdr_train import recipe
from dmdr_train.evaluation import Scores
from dmdr_train.tracking import read_metrics

COLUMNS = {
    "frechet": "FD",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "inception": "IS",
    "frechet_pixels": "FD pixels",
}


def cells(scores: Scores) -> list[str]:
    return [f"{getattr(scores, name):.{1 if getattr(scores, name) >= 10 else 3}f}" for name in COLUMNS]


def print_table(scores: dict[str, Scores]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("pictures", *COLUMNS.values(), title="evaluation by a classifier that no reward uses")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in scores.values():
        table.add_row(row.name, *cells(row))
    Console(width=110).print(table)


def write_summary(folder: Path, settings: recipe.Recipe, scores: dict[str, Scores], generate: str) -> None:
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
            "| pictures | " + " | ".join(COLUMNS.values()) + " |",
            "|---|" + "---:|" * len(COLUMNS),
            *(f"| {row.name} | " + " | ".join(cells(row)) + " |" for row in scores.values()),
            "",
            f"Over {evaluation.pictures} pictures. FD, precision, recall, accuracy and IS are taken with "
            f"`{Path(evaluation.classifier).name}`, which no reward uses; FD pixels on pictures averaged to 8 x 8.",
            "",
            "![before and after](before_after.png)",
            "",
        ]
    lines += ["![curves](curves.png)", "", "Generate:", "", f"    {generate}", ""]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")


def draw_curves(folder: Path, settings: recipe.Recipe) -> None:
    """curves.png: every logged loss and reward over the steps, with the start of the joint stage marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if n.startswith(("loss/", "reward/", "teacher_"))]
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), color="#3b6ea5")
        axis.set(title=name, xlabel="step", xlim=(0, settings.run.steps))
        if settings.joint_start:
            axis.axvline(settings.joint_start, color="#c44e52", linestyle=":", label="joint stage")
        axis.grid(alpha=0.3)
    if settings.joint_start:
        axes[0][0].legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)
