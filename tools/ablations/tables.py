"""The Markdown tables of a study."""

from collections.abc import Sequence

import numpy as np

from ablations.study import MEASURES, Run, Runs, Study


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


def by_stage(study: Study, runs: Sequence[Run]) -> dict[str, dict[str, list[float]]]:
    """The values of a variant's runs by stage and measure; stages that the variant does not have are left out."""
    stages = [stage for stage in study.stages if runs and stage in runs[0].scores]
    return {stage: {title: [run.scores[stage][title] for run in runs] for title in MEASURES} for stage in stages}


def table(study: Study, runs: Runs) -> str:
    """A row per variant and stage."""
    lines = [f"| variant | seeds | after | {' | '.join(MEASURES)} | training, s |"]
    lines.append(f"|---|---:|---|{'---|' * (len(MEASURES) + 1)}")
    for variant, each in runs.items():
        stages = by_stage(study, each)
        for stage, values in stages.items():
            cells = [cell(values[title]) for title in MEASURES]
            seconds = cell([run.seconds for run in each], ".0f") if stage == list(stages)[-1] else "–"
            lines.append(f"| {variant} | {len(each)} | {stage.replace('_', ' ')} | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def followed(runs: Sequence[Run], title: str) -> tuple[list[int], np.ndarray]:
    """The steps at which all runs logged a value, and its values, `[runs, steps]`."""
    logged = [run.over_time[title] for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in logged)))
    return steps, np.array([[each[step] for step in steps] for each in logged])


def table_over_time(study: Study, runs: Runs, columns: int = 5) -> str:
    """The mean of each followed value at steps from the first to the last."""
    lines = []
    for variant, each in runs.items():
        for title in study.over_time if each else []:
            steps, values = followed(each, title)
            chosen = sorted({round(number) for number in np.linspace(0, len(steps) - 1, columns)})
            if not lines:
                lines = [f"| variant | value | {' | '.join(f'step {steps[i]}' for i in chosen)} |"]
                lines.append(f"|---|---|{'---:|' * len(chosen)}")
            cells = [f"{mean:.3f}" for mean in values.mean(0)[chosen]]
            lines.append(f"| {variant} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)
