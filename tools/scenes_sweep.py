"""The text-to-image demo on several seeds; prints the table of docs/evidence.md.

    python tools/scenes_sweep.py --seeds 0 1 2 --output runs/scenes-sweep

The evaluation does not depend on the training's seed, so the teacher is measured with the first seed only. Complete
runs are not repeated.
"""

import argparse
import sys
from pathlib import Path

from dmdr_train.reporting.tables import cells, columns
from sweeping import train, training_seconds

TITLES = {"cold_start": "after cold start", "refl": "after ReFL", "srpo": "after SRPO"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/scenes-sweep"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every run")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        folder, first = options.output / f"seed-{seed}", seed == options.seeds[0]
        brief = [] if first else ["tracking.evaluation.teacher_steps=[4]"]
        scores = train("demo-t2i", folder, seed, [*options.overrides, *brief])
        if first:
            headings = columns(scores)
            print(f"| seed | pictures | {' | '.join(headings)} | training, s |")
            print(f"|---|---|{'---:|' * (len(headings) + 1)}")
            for key in ("real", "teacher-28", "teacher-4"):
                print(f"| – | {scores[key].name} | {' | '.join(cells(scores[key]))} | – |")
        for key, title in TITLES.items():
            seconds = f"{training_seconds(folder):.0f}" if key == "srpo" else "–"
            print(f"| {seed} | {title} | {' | '.join(cells(scores[key]))} | {seconds} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
