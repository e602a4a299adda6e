"""The default rules notice a reward that is asked for too much, and leave a healthy one in peace; what a stop leaves.

The demo's student starts here as the teacher itself, in four steps, so that a short run needs no cold start.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHORT = (
    "rollout={steps: 4, mode: ode}",
    "guidance={ratio: 2}",
    "objectives.1.start=0",
    "optim.batch_size=8",
    "optim.generator.lr=0.002",
    "optim.generator.schedule=constant",
    "optim.ema=null",
    "run.steps=20",
    "run.checkpoint_every=0",
    "run.device=cpu",
    "tracking={tensorboard: false, samples: {count: 2}}",
    "watch.every=4",
)


def alarms(folder: Path, *overrides: str) -> list[str]:
    """What a short run of the demo was warned of, in summary.md."""
    command = [sys.executable, str(ROOT / "packages/dmdr-train/run.py"), "--config", "demo", f"run.output={folder}"]
    done = subprocess.run([*command, *SHORT, *overrides], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "summary.md").read_text(encoding="utf-8").splitlines()
    found = [line.removeprefix("- ") for line in lines if line.startswith("- early warning at step")]
    assert all(line in done.stderr + done.stdout for line in found)
    return found


def test_an_absurd_reward_weight_is_caught(tmp_path: Path) -> None:
    assert any("diversity" in line for line in alarms(tmp_path / "run", "objectives.1.weight=1000"))


def test_a_healthy_run_is_left_in_peace(tmp_path: Path) -> None:
    assert alarms(tmp_path / "run") == []
    assert "None of 6 rules had anything to say." in (tmp_path / "run/summary.md").read_text(encoding="utf-8")


WATCH = {
    "every": 1,
    "prompts": 2,
    "pictures": 2,
    "rules": [{"kind": "limit", "metric": "saturation", "above": 0.0, "evaluations": 3, "action": "stop"}],
}


def test_a_rule_that_stops(
    workshop: Any, tmp_path: Path, read_rows: Callable[[Path], list[dict[str, float]]], launchers: Any
) -> None:
    """Exit code 4, one line, a checkpoint and a report; what went before a resume counts as if there had been none."""
    workshop.recipe["watch"] = WATCH | {"rules": [WATCH["rules"][0] | {"start": 1}]}
    stopped = workshop.run(launcher=launchers["torchrun"](2))
    assert "early warning at step 4: limit: saturation" in stopped.stderr
    out = workshop.folder / "out"
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000002", "step-00000004"]
    assert "- early warning at step 4" in (out / "summary.md").read_text(encoding="utf-8")

    alone = workshop.run("run.output=alone")
    assert alone.code == 4
    assert [line for line in alone.stderr.splitlines() if line.startswith("stopped: early warning at step 4: limit:")]
    cut = json.dumps(read_rows(workshop.folder / "alone"))
    resumed = workshop.run("run.output=alone", "run.resume=alone/checkpoints/step-00000002")
    assert resumed.code == 4
    assert json.dumps(read_rows(workshop.folder / "alone")) == cut
