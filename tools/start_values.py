"""Compare start values of the fake score's LoRA on the built-in problem; prints a table of docs/evidence.md.

    python tools/start_values.py --seeds 0 1 2 --output runs/start-values

The problem is the demo's; the shape of the run is that of sit-xl-2-cold-start: all weights of a one-step generator are
trained with distribution matching alone, and the fake score adapts the outputs of to_q and to_v with rank 32. Complete
runs are not repeated. The table shows the mean and the standard deviation over the seeds that are complete.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from dmdr_train.evaluation.scores import read_scores
from dmdr_train.tracking.metrics_file import read_metrics
from sweeping import PORT, train

STEPS = (50, 400)
WINDOW = 20  # steps over which the fake score's loss is averaged
RATES = (2e-5, 1e-4, 4e-4)
STARTS = ("kaiming", "output_gaussian")
OVERRIDES = [
    "objectives=[{kind: distribution_matching}]",
    "guidance={ratio: 2, fake_scale: 2.0, dynamics: {steps: 10000, teacher_scale: 0.75}}",
    f"run.steps={STEPS[-1]}",
    "run.checkpoint_every=0",
    "watch={every: 0}",
    "tracking.log_every=1",
    "tracking.tensorboard=false",
    "tracking.samples={every: 0, count: 1}",
    "tracking.evaluation.pictures=300",
    f"tracking.evaluation.every={STEPS[0]}",
    "tracking.evaluation.teacher_steps=[]",
]


def overrides(start: str, rate: float, generator_rate: float) -> list[str]:
    """The changes to the demo's recipe for one start value and one learning rate of the fake score."""
    return [
        *OVERRIDES,
        f"model.fake_score_lora={{rank: 32, alpha: 32, targets: [to_q, to_v], init: {start}}}",
        f"optim={{batch_size: 16, generator: {{lr: {generator_rate:.1e}, weight_decay: 0.01}}, "
        f"fake_score: {{lr: {rate:.1e}}}}}",
    ]


def measured(run: Path) -> list[float]:
    """The fake score's loss, and the student's Fréchet distance, at each of STEPS."""
    losses = {row["step"]: row["loss/fake_score"] for row in read_metrics(run)}
    scores = read_scores(run)
    values = [statistics.mean(losses[step - i] for i in range(WINDOW)) for step in STEPS]
    return [*values, scores[f"step-{STEPS[0]}"].frechet, scores["cold_start"].frechet]


def cell(values: Sequence[float]) -> str:
    """Mean, and standard deviation over the seeds where there are several."""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3g}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/start-values"))
    parser.add_argument("--generator-rate", type=float, default=1e-4, help="the generator's learning rate")
    parser.add_argument("--port", type=int, default=PORT, help="of the first run")
    parser.add_argument("--show", action="store_true", help="train nothing: print the table of the complete runs")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    folders = {
        (start, rate, seed): options.output / f"{start}-{rate:.0e}-seed-{seed}"
        for seed in options.seeds
        for rate in RATES
        for start in STARTS
    }
    if not options.show:
        for i, ((start, rate, seed), folder) in enumerate(folders.items()):
            changes = overrides(start, rate, options.generator_rate)
            train("demo", folder, seed, changes, processes=1, port=options.port + i)
    titles = [f"{name} at {step}" for name in ("fake-score loss", "FD") for step in STEPS]
    print(f"| init | fake score's lr | seeds | {' | '.join(titles)} |")
    print(f"|---|---:|---:|{'---:|' * len(titles)}")
    for start in STARTS:
        for rate in RATES:
            runs = [folders[start, rate, seed] for seed in options.seeds]
            rows = [measured(run) for run in runs if (run / "summary.md").exists()]
            cells = [cell(column) for column in zip(*rows, strict=True)] or ["–"] * len(titles)
            print(f"| `{start}` | {rate:.0e} | {len(rows)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
