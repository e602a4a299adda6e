"""What a rule that stops leaves, and that a resumed run judges as an uninterrupted one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WATCH = {
    "every": 1,
    "prompts": 2,
    "pictures": 2,
    "rules": [{"kind": "limit", "metric": "saturation", "above": 0.0, "evaluations": 3, "action": "stop"}],
}


def test_a_rule_that_stops(workshop: Any, read_rows: Callable[[Path], list[dict[str, float]]], launchers: Any) -> None:
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
