"""The figures of a study."""

import itertools
from pathlib import Path

import matplotlib
import numpy as np

from ablations.study import Runs, Study
from ablations.tables import by_stage, followed, interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def fidelity_and_diversity(study: Study, runs: Runs, path: Path) -> None:
    """A point per variant and stage, with the interval of each mean, and an arrow from each stage to the next."""
    fig, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for number, (variant, each) in enumerate((name, found) for name, found in runs.items() if found):
        colour = f"C{number}"
        points = []
        stages = by_stage(study, each)
        for stage, values in stages.items():
            x, y = (float(np.mean(values[title])) for title in ("recall", "FD"))
            bars = [
                [[max(mean - low, 0)], [max(high - mean, 0)]]
                for mean, (low, high) in ((x, interval(values["recall"])), (y, interval(values["FD"])))
            ]
            last = stage == list(stages)[-1]
            axes.errorbar(
                x,
                y,
                yerr=bars[1],
                xerr=bars[0],
                color=colour,
                marker="o" if last else ".",
                elinewidth=0.8,
                alpha=1 if last else 0.5,
                label=variant if last else None,
            )
            points.append((x, y))
        for start, end in itertools.pairwise(points):
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
    axes.set_xlabel("diversity: recall (higher is better)")
    axes.set_ylabel("fidelity: FD (lower is better)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def over_time(study: Study, runs: Runs, path: Path) -> None:
    """A panel per followed value: the mean of each variant, with a band from the lowest to the highest seed."""
    fig, panels = plt.subplots(
        1, len(study.over_time), squeeze=False, figsize=(4 * len(study.over_time), 3.6), layout="constrained"
    )
    for axes, title in zip(panels[0], study.over_time, strict=True):
        for variant, each in ((name, found) for name, found in runs.items() if found):
            steps, values = followed(each, title)
            axes.plot(steps, values.mean(0), label=variant, linewidth=1.5)
            axes.fill_between(steps, values.min(0), values.max(0), alpha=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    fig.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)
