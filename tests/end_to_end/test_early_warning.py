"""Rewards that are asked for too much of are noticed by the default rules, and healthy ones are left in peace.

The student starts as the teacher itself, in four steps, so that the few steps of a test need no cold start.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHORT = (
    "rollout={steps: 4, mode: ode}",
    "guidance={ratio: 1}",
    "objectives.1.start=0",
    "optim.batch_size=8",
    "optim.generator.lr=0.002",
    "optim.generator.schedule=constant",
    "optim.ema=null",
    "run.checkpoint_every=0",
    "run.device=cpu",
    "tracking={tensorboard: false, samples: {count: 2}}",
    "watch.every=4",
)


def train(run_py: Any, folder: Path, *overrides: str, steps: int = 20) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, standard error and rows of a short run of the demo."""
    command = [sys.executable, str(ROOT / "packages/dmdr-train/run.py"), "--config", "demo", f"run.output={folder}"]
    done = subprocess.run(
        [*command, *SHORT, f"run.steps={steps}", *overrides], capture_output=True, text=True, env=run_py()
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return done.returncode, done.stderr, rows
