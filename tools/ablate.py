"""Compare variants of a recipe on a built-in problem over several seeds; prints a table and draws a figure.

    python tools/ablate.py shapes_less_work --seeds 0 1 2 --output runs/ablate --jobs 2
    python tools/ablate.py shapes_less_work --seeds 0 1 2 --output runs/ablate --show    # train nothing

A study is a file in tools/ablations: a recipe, the scores that are compared, and a list of overrides per variant. Each
run has one process. Complete runs are not repeated, so an interrupted study goes on where it was. The table gives the
mean over the seeds, and between brackets the 95% bootstrap interval of that mean. With few seeds the interval is too
narrow: it cannot reach past the lowest and the highest seed. The figure shows fidelity against diversity, with an arrow
from the first stage of each variant to the last.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml
from dmdr_train.evaluation.scores import Scores, read_scores
from pydantic import BaseModel
from sweeping import PORT, train, training_seconds

STUDIES = Path(__file__).parent / "ablations"
MEASURES = {"FD": "frechet", "precision": "precision", "recall": "recall", "accuracy": "accuracy"}


class Study(BaseModel, extra="forbid"):
    """A file of tools/ablations.

    Attributes:
        recipe: a built-in recipe.
        stages: keys of evaluation.json: the first and the last stage, or one.
        overrides: of the recipe, for every variant.
        variants: further overrides by the name of the variant.
    """

    recipe: str
    stages: list[str]
    overrides: list[str] = []
    variants: dict[str, list[str]]


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the mean."""
    picked = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values)))
    low, high = np.percentile(picked.mean(1), [2.5, 97.5])
    return float(low), float(high)


def cell(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and interval."""
    mean = format(float(np.mean(values)), form)
    if len(values) == 1:
        return mean
    low, high = interval(values)
    return f"{mean} [{low:{form}}, {high:{form}}]"


def folder_name(variant: str, seed: int) -> str:
    return f"{variant.replace(' ', '-').replace(',', '')}-seed-{seed}"


def table(study: Study, runs: dict[str, list[Path]]) -> str:
    """The Markdown table of the runs that are complete."""
    lines = [f"| variant | seeds | after | {' | '.join(MEASURES)} | training, s |"]
    lines.append(f"|---|---:|---|{'---|' * (len(MEASURES) + 1)}")
    for variant, folders in runs.items():
        for stage in study.stages if folders else []:
            scores = [read_scores(folder)[stage] for folder in folders]
            cells = [cell([getattr(each, name) for each in scores]) for name in MEASURES.values()]
            seconds = [training_seconds(folder) for folder in folders]
            shown = cell(seconds, ".0f") if stage == study.stages[-1] else "–"
            title = stage.replace("_", " ")
            lines.append(f"| {variant} | {len(folders)} | {title} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def figure(study: Study, runs: dict[str, list[Path]], path: Path) -> None:
    """Fidelity against diversity: a point per variant and stage, with the interval of each mean."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for number, (variant, folders) in enumerate((name, found) for name, found in runs.items() if found):
        colour = f"C{number}"
        points = []
        for stage in study.stages:
            scores: list[Scores] = [read_scores(folder)[stage] for folder in folders]
            recall, frechet = [each.recall for each in scores], [each.frechet for each in scores]
            x, y = float(np.mean(recall)), float(np.mean(frechet))
            bars = [
                [[max(m - low, 0)], [max(high - m, 0)]]
                for m, (low, high) in ((x, interval(recall)), (y, interval(frechet)))
            ]
            last = stage == study.stages[-1]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(path.stem for path in STUDIES.glob("*.yaml")))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="of the study; all unless given")
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--port", type=int, default=PORT, help="of the first run")
    parser.add_argument("--show", action="store_true", help="train nothing: show the complete runs")
    options = parser.parse_args()
    study = Study(**yaml.safe_load((STUDIES / f"{options.study}.yaml").read_text(encoding="utf-8")))
    for name in set(options.variants or []) - set(study.variants):
        parser.error(f"--variants: there is no {name!r} in {options.study}; it has {', '.join(study.variants)}")
    variants = {
        name: changes for name, changes in study.variants.items() if name in (options.variants or study.variants)
    }
    output = options.output / options.study
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folders = {(seed, name): output / folder_name(name, seed) for seed in options.seeds for name in variants}
    if not options.show:
        with ThreadPoolExecutor(options.jobs) as pool:
            waiting = [
                pool.submit(
                    train,
                    study.recipe,
                    folder,
                    seed,
                    ["tracking.evaluation.teacher_steps=[]", *study.overrides, *variants[name]],
                    1,
                    options.port + i,
                )
                for i, ((seed, name), folder) in enumerate(folders.items())
            ]
            for each in waiting:
                each.result()
    runs = {
        name: [folders[seed, name] for seed in options.seeds if (folders[seed, name] / "seconds.json").exists()]
        for name in variants
    }
    print(table(study, runs))
    figure(study, runs, output / "fidelity_and_diversity.png")


if __name__ == "__main__":
    sys.exit(main())
