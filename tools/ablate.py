"""Compare variants of a recipe on a built-in problem over several seeds; prints a table and draws a figure.

    python tools/ablate.py shapes_less_work --seeds 0 1 2 --output runs/ablate --jobs 2
    python tools/ablate.py shapes_less_work --seeds 0 1 2 --output runs/ablate --show    # train nothing

A study is a file in tools/ablations: a recipe, the scores that are compared, and a list of overrides per variant. Each
run has one process. Complete runs are not repeated, so an interrupted study goes on where it was. The table gives the
mean over the seeds, and between brackets the 95% bootstrap interval of that mean. With few seeds the interval is too
narrow: it cannot reach past the lowest and the highest seed. The figure shows fidelity against diversity, with an arrow
from the first stage of each variant to the last. A study can also name logged values, which a second table and a second
figure follow over the steps.
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
from dmdr_train.tracking.metrics_file import read_metrics
from pydantic import BaseModel
from sweeping import PORT, train, training_seconds

STUDIES = Path(__file__).parent / "ablations"
NO_TEACHER = "tracking.evaluation.teacher_steps=[]"
MEASURES = {"FD": "frechet", "precision": "precision", "recall": "recall", "accuracy": "accuracy"}


class Study(BaseModel, extra="forbid"):
    """A file of tools/ablations.

    Attributes:
        recipe: a built-in recipe.
        stages: keys of evaluation.json, in order. A variant shows those that it has.
        overrides: of the recipe, for every variant.
        variants: further overrides by the name of the variant.
        first: overrides of a run whose end all variants of a seed start from, in place of `overrides`.
        over_time: logged values that are followed over the steps, by their titles.
    """

    recipe: str
    stages: list[str]
    overrides: list[str] = []
    variants: dict[str, list[str]]
    first: list[str] | None = None
    over_time: dict[str, str] = {}


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


def stages_of(study: Study, folders: Sequence[Path]) -> dict[str, list[Scores]]:
    """The scores of a variant's runs by stage; stages that the variant does not have are left out."""
    scores = [read_scores(folder) for folder in folders]
    return {stage: [each[stage] for each in scores] for stage in study.stages if scores and stage in scores[0]}


def table(study: Study, runs: dict[str, list[Path]]) -> str:
    """The Markdown table of the runs that are complete."""
    lines = [f"| variant | seeds | after | {' | '.join(MEASURES)} | training, s |"]
    lines.append(f"|---|---:|---|{'---|' * (len(MEASURES) + 1)}")
    for variant, folders in runs.items():
        for stage, scores in stages_of(study, folders).items():
            cells = [cell([getattr(each, name) for each in scores]) for name in MEASURES.values()]
            seconds = [training_seconds(folder) for folder in folders]
            shown = cell(seconds, ".0f") if stage == list(stages_of(study, folders))[-1] else "–"
            title = stage.replace("_", " ")
            lines.append(f"| {variant} | {len(folders)} | {title} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def followed(folders: Sequence[Path], key: str) -> tuple[list[int], "np.ndarray"]:
    """The steps at which all runs logged `key`, and its values, `[runs, steps]`."""
    logged = [{row["step"]: row[key] for row in read_metrics(folder) if key in row} for folder in folders]
    steps = sorted(set.intersection(*(set(each) for each in logged)))
    return steps, np.array([[each[step] for step in steps] for each in logged])


def table_over_time(study: Study, runs: dict[str, list[Path]], columns: int = 5) -> str:
    """The Markdown table of the mean of each value at steps from the first to the last."""
    lines = []
    for variant, folders in runs.items():
        for title, key in study.over_time.items() if folders else []:
            steps, values = followed(folders, key)
            chosen = sorted({round(each) for each in np.linspace(0, len(steps) - 1, columns)})
            if not lines:
                lines = [f"| variant | value | {' | '.join(f'step {steps[i]}' for i in chosen)} |"]
                lines.append(f"|---|---|{'---:|' * len(chosen)}")
            cells = [f"{mean:.3f}" for mean in values.mean(0)[chosen]]
            lines.append(f"| {variant} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure_over_time(study: Study, runs: dict[str, list[Path]], path: Path) -> None:
    """A panel per value: the mean of each variant over the steps, with a band from the lowest to the highest seed."""
    import matplotlib.pyplot as plt

    size = {"figsize": (4 * len(study.over_time), 3.6), "layout": "constrained"}
    fig, panels = plt.subplots(1, len(study.over_time), squeeze=False, **size)
    for axes, (title, key) in zip(panels[0], study.over_time.items(), strict=True):
        for variant, folders in ((name, found) for name, found in runs.items() if found):
            steps, values = followed(folders, key)
            axes.plot(steps, values.mean(0), label=variant, linewidth=1.5)
            axes.fill_between(steps, values.min(0), values.max(0), alpha=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    fig.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    fig.savefig(path, dpi=130)


def figure(study: Study, runs: dict[str, list[Path]], path: Path) -> None:
    """Fidelity against diversity: a point per variant and stage, with the interval of each mean."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for number, (variant, folders) in enumerate((name, found) for name, found in runs.items() if found):
        colour = f"C{number}"
        points = []
        stages = stages_of(study, folders)
        for stage, scores in stages.items():
            recall, frechet = [each.recall for each in scores], [each.frechet for each in scores]
            x, y = float(np.mean(recall)), float(np.mean(frechet))
            bars = [
                [[max(m - low, 0)], [max(high - m, 0)]]
                for m, (low, high) in ((x, interval(recall)), (y, interval(frechet)))
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
    starts: dict[int, list[str]] = {seed: [] for seed in options.seeds}
    if study.first is not None:
        for seed in options.seeds:
            folder = output / folder_name("first", seed)
            starts[seed] = [f"run.init_from={folder}"]
            if not options.show:
                train(study.recipe, folder, seed, [NO_TEACHER, *study.first], 1, options.port)
    if not options.show:
        with ThreadPoolExecutor(options.jobs) as pool:
            waiting = [
                pool.submit(
                    train,
                    study.recipe,
                    folder,
                    seed,
                    [NO_TEACHER, *starts[seed], *study.overrides, *variants[name]],
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
    if study.over_time and any(runs.values()):
        print(f"\n{table_over_time(study, runs)}")
        figure_over_time(study, runs, output / "over_time.png")


if __name__ == "__main__":
    sys.exit(main())
