"""Measure how far random test outcomes stay from their limits, over seeds and CPU kernels; print a table in Markdown.

    python tools/margins.py                                      # all runs, 5 seeds, 3 settings: 90 minutes
    python tools/margins.py absurd healthy --seeds 0 1 --only own

The runs are defined in tests/end_to_end/test_early_warning.py and test_demo.py; here each has one process and its own
`run.seed`. `kernels.py` defines the settings. For the runs of early warning, a number shows how far a limit of the
default rules is exceeded at three checks in a row: above 1 there is an alarm. Complete runs are not repeated.
"""

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from dmdr_train.evaluation.scores import read_scores
from dmdr_train.monitoring.rules import evaluations
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Limit
from dmdr_train.tracking.metrics_file import read_metrics
from kernels import settings

ROOT = Path(__file__).parents[1]
WARNING, DEMO = (runpy.run_path(str(ROOT / f"tests/end_to_end/test_{name}.py")) for name in ("early_warning", "demo"))


def exceeded(run: Path) -> str:
    """Return the limit that is exceeded most, and the limit of the diversity."""
    found, rows = {}, evaluations(read_metrics(run))
    for rule in load_recipe(str(run / "recipe.yaml")).rules:
        if isinstance(rule, Limit):
            counted = [row for row in rows if row["step"] > (rule.start or 0)]
            whole = [row[f"teacher/{rule.metric}"] if rule.relative_to else 1.0 for row in counted]
            shares = [row[rule.metric] / base for row, base in zip(counted, whole, strict=True)]
            beyond = [x / rule.above if rule.above is not None else (rule.below or 0) / x for x in shares]
            n = rule.evaluations
            found[rule.metric] = max(min(beyond[i : i + n]) for i in range(len(beyond) - n + 1))
    most = max(found, key=lambda metric: found[metric])
    alarms = (run / "summary.md").read_text(encoding="utf-8").count("- early warning at step")
    return f"{most} {found[most]:.2f}, diversity {found['diversity']:.2f}, alarms {alarms}"


def scored(run: Path) -> str:
    """Return the scores that the demo's test compares."""
    scores = read_scores(run)
    return ", ".join(
        f"{name}: FD {each.frechet:.2f}, FD pixels {each.frechet_pixels:.2f}, recall {each.recall:.2f}, "
        f"accuracy {each.accuracy:.3f}"
        for name, each in scores.items()
    )


Measure = Callable[[Path], str]
RUNS: dict[str, tuple[str, tuple[str, ...], Measure]] = {
    **{name: ("demo", changes, exceeded) for name, changes in WARNING["DEMO"].items()},
    **{name: ("demo-t2i", changes, exceeded) for name, changes in WARNING["SCENES"].items()},
    "rewarded": ("demo", DEMO["SHORT"], scored),
    "control": ("demo", (*DEMO["SHORT"], *DEMO["CONTROL"]), scored),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"any of {', '.join(RUNS)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", default="own,intel,all-oldest", metavar="NAME,…", help="settings of kernels.py")
    parser.add_argument("--output", type=Path, default=Path("runs/margins"))
    options = parser.parse_args()
    if unknown := set(options.runs) - set(RUNS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; valid are {', '.join(RUNS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    print("| run | setting | seed | measured |\n|---|---|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        chosen = [each for each in settings(Path(folder)) if each.name in options.only.split(",")]
        for name in options.runs or RUNS:
            config, changes, measure = RUNS[name]
            for setting in chosen:
                for seed in [] if setting.left_out else options.seeds:
                    run = options.output / f"{name}-{setting.name}-{seed}"
                    if not (run / "summary.md").exists():
                        command = [sys.executable, str(ROOT / "packages/dmdr-train/run.py"), "--config", config]
                        command += [*changes, f"run.output={run}", f"run.seed={seed}"]
                        told = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
                        with run.with_suffix(".log").open("w") as log:
                            environment = {**os.environ, **told, **setting.variables}
                            subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
                    print(f"| {name} | {setting.name} | {seed} | {measure(run)} |", flush=True)


if __name__ == "__main__":
    main()
