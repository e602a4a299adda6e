"""The demo on several seeds, each beside a control without the reward; prints the table of docs/evidence.md.

    python tools/seed_sweep.py --seeds 0 1 2 3 4 --output runs/sweep             # one run after the other
    python tools/seed_sweep.py --seeds 0 1 2 3 4 --output runs/sweep --jobs 2    # two at a time, one process each

A control trains exactly as long, with distribution matching alone. The evaluation does not depend on the training's
seed, so the teacher is measured with the first seed only. Complete runs are not repeated.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmdr_train.evaluation.scores import Scores
from sweeping import PORT, train, training_seconds

BRIEF = ["tracking.evaluation.teacher_steps=[1]"]
PLAIN = "objectives=[{kind: distribution_matching}]"
COLUMNS = ("frechet", "precision", "recall", "accuracy", "frechet_pixels")


def cells(scores: Scores) -> str:
    return " | ".join(f"{getattr(scores, name):.3f}" for name in COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"))
    parser.add_argument(
        "--jobs",
        type=int,
        choices=[1, 2],
        default=1,
        help="runs at the same time: one run with two processes, or two runs with one",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every run")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    print("| seed | pictures | FD | precision | recall | accuracy | FD pixels | training, s |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    verdicts: list[tuple[float, ...]] = []
    teacher: dict[str, Scores] = {}
    pool = ThreadPoolExecutor(options.jobs)
    runs = {}
    for seed in options.seeds:
        for name, extra in (("", [] if seed == options.seeds[0] else BRIEF), ("-control", [*BRIEF, PLAIN])):
            runs[seed, name] = pool.submit(
                train,
                "demo",
                options.output / f"seed-{seed}{name}",
                seed,
                [*options.overrides, *extra],
                processes=2 // options.jobs,
                port=PORT + len(runs),
            )
    for seed in options.seeds:
        joint, control = options.output / f"seed-{seed}", options.output / f"seed-{seed}-control"
        rewarded, plain = runs[seed, ""].result(), runs[seed, "-control"].result()
        if not teacher:
            teacher = {key: rewarded[key] for key in ("real", "teacher-50", "teacher-4", "teacher-1")}
            for row in teacher.values():
                print(f"| – | {row.name} | {cells(row)} | – |")
        for folder, name, scores in (
            (joint, "after cold start", rewarded["cold_start"]),
            (control, "control, no reward", plain["cold_start"]),
            (joint, "after joint stage", rewarded["joint"]),
        ):
            shown = "–" if name == "after cold start" else f"{training_seconds(folder):.0f}"
            print(f"| {seed} | {name} | {cells(scores)} | {shown} |", flush=True)
        verdicts.append(
            (
                rewarded["joint"].frechet / teacher["teacher-50"].frechet,
                rewarded["joint"].frechet / teacher["teacher-1"].frechet,
                rewarded["joint"].accuracy - plain["cold_start"].accuracy,
                rewarded["joint"].accuracy - teacher["teacher-50"].accuracy,
                rewarded["joint"].recall - plain["cold_start"].recall,
                plain["cold_start"].frechet / teacher["teacher-50"].frechet,
            )
        )
    names = (
        "student FD / teacher FD, joint",
        "student FD / one-step teacher FD",
        "accuracy over the control",
        "accuracy over the teacher",
        "recall over the control",
        "control FD / teacher FD",
    )
    print()
    for name, values in zip(names, zip(*verdicts, strict=True), strict=True):
        print(f"{name}: {', '.join(f'{v:.3f}' for v in values)}")


if __name__ == "__main__":
    sys.exit(main())
