"""curves.png: the logged values of a run over its steps."""

from pathlib import Path

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.monitoring import rules
from dmdr_train.recipe import schema
from dmdr_train.tracking.metrics_file import read_metrics


def draw_curves(folder: Path, settings: schema.Recipe) -> None:
    """Draw the losses, rewards and measures of early warning over the steps, with the ends of the stages marked."""
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
    write_whole(folder / "curves.png", lambda path: figure.savefig(path, dpi=110, format="png"))
    plt.close(figure)
