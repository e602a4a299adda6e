"""Compare variants of a recipe on a built-in problem over several seeds; prints a table and draws a figure.

    python tools/ablate.py shapes_less_work --seeds 0 1 2 --output runs/ablate --jobs 2
    python tools/ablate.py shapes_less_work --seeds 0 1 2 --output runs/ablate --show    # train nothing
    python tools/ablate.py shapes_dynamics --recorded --output runs/ablate    # the runs that docs/evidence.md shows

A study is a file in tools/ablations: a recipe, the scores that are compared, and a list of overrides per variant. Each
run has one process. Complete runs are not repeated, so an interrupted study goes on where it was. The table gives the
mean over the seeds, and between brackets the 95% bootstrap interval of that mean. With few seeds the interval is too
narrow: it cannot reach past the lowest and the highest seed. The figure shows fidelity against diversity, with an arrow
from the first stage of each variant to the last. A study can also name logged values, which a second table and a second
figure follow over the steps. docs/evidence keeps the scores of runs, so that a later study needs to train only new
seeds and variants.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ablations.study import (
    RECORDS,
    Runs,
    Study,
    add_to_record,
    folder_name,
    read_record,
    read_runs,
    read_study,
    study_names,
)
from ablations.tables import table, table_over_time
from sweeping import PORT, train

NO_TEACHER = "tracking.evaluation.teacher_steps=[]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=study_names())
    parser.add_argument("--seeds", type=int, nargs="+", help="0 1 2 unless given; with --recorded all that there are")
    parser.add_argument("--variants", nargs="+", help="of the study; all unless given")
    parser.add_argument("--output", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--port", type=int, default=PORT, help="of the first run")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--show", action="store_true", help="train nothing: show the complete runs")
    source.add_argument("--recorded", action="store_true", help="train nothing: show the runs in docs/evidence")
    source.add_argument("--record", action="store_true", help="train nothing: add the complete runs to docs/evidence")
    options = parser.parse_args()
    study = read_study(options.study)
    for name in set(options.variants or []) - set(study.variants):
        parser.error(f"--variants: there is no {name!r} in {options.study}; it has {', '.join(study.variants)}")
    variants = [name for name in study.variants if name in (options.variants or study.variants)]
    output = options.output / options.study
    output.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or [0, 1, 2]
    if options.recorded:
        recorded = [run for run in read_record(options.study) if run.seed in (options.seeds or [run.seed])]
        runs = {name: [run for run in recorded if run.variant == name] for name in variants}
    else:
        if not (options.show or options.record):
            train_all(study, output, variants, seeds, options.jobs, options.port)
        runs = read_runs(study, output, variants, seeds)
    if not any(runs.values()):
        parser.error(f"there is no such run in {RECORDS if options.recorded else output}")
    if options.record:
        add_to_record(options.study, runs)
    show(study, runs, output)


def train_all(study: Study, output: Path, variants: Sequence[str], seeds: Sequence[int], jobs: int, port: int) -> None:
    """Train what is not complete: for each seed the run that the variants start from, and then the variants."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    starts: dict[int, list[str]] = {seed: [] for seed in seeds}
    if study.first is not None:
        for seed in seeds:
            folder = output / folder_name("first", seed)
            starts[seed] = [f"run.init_from={folder}"]
            train(study.recipe, folder, seed, [NO_TEACHER, *study.first], 1, port)
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [
            pool.submit(
                train,
                study.recipe,
                output / folder_name(name, seed),
                seed,
                [NO_TEACHER, *starts[seed], *study.overrides, *study.variants[name]],
                1,
                port + number,
            )
            for number, (seed, name) in enumerate((seed, name) for seed in seeds for name in variants)
        ]
        for each in waiting:
            each.result()


def show(study: Study, runs: Runs, output: Path) -> None:
    """Print the tables of the runs and draw their figures."""
    from ablations import figures

    print(table(study, runs))
    figures.fidelity_and_diversity(study, runs, output / "fidelity_and_diversity.png")
    if study.over_time and any(runs.values()):
        print(f"\n{table_over_time(study, runs)}")
        figures.over_time(study, runs, output / "over_time.png")


if __name__ == "__main__":
    sys.exit(main())
