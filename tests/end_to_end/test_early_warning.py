"""The default rules notice a reward that is asked for too much, and leave a healthy one in peace; what a stop leaves.

The student of the text-to-image problem starts here as its teacher, so that a short run needs no cold start.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

BRIGHT = (
    "kind: srpo, margin: 1.0, positive: [bright], negative: [dull], reward: {name: clip, "
    "checkpoint: ../scenes/reward/open_clip_model.safetensors, "
    "options: {model: ../scenes/reward/open_clip_config.json}}"
)
SHORT = (
    "guidance.ratio=1",
    "guidance.dynamics=null",
    "optim.batch_size=8",
    "optim.generator.lr=0.002",
    "optim.generator.schedule=constant",
    "optim.ema=null",
    "run.steps=12",
    "run.checkpoint_every=0",
    "run.device=cpu",
    "tracking.tensorboard=false",
    "tracking.evaluation=null",
    "tracking.samples.count=2",
    "tracking.samples.every=0",
    "watch={every: 2, prompts: 4, pictures: 2}",
)


def summary(workshop: Any, weight: float) -> str:
    """What a short run with this weight of brightness says in the end."""
    objectives = f"objectives=[{{kind: distribution_matching}}, {{weight: {weight}, {BRIGHT}}}]"
    workshop.run("run.output=out", objectives, *SHORT, config="demo-t2i").check()
    return (workshop.folder / "out/summary.md").read_text(encoding="utf-8")


def test_an_absurd_weight_is_noticed_by_the_default_rules(workshop: Any) -> None:
    assert "- early warning at step" in summary(workshop, 1000.0)


def test_a_healthy_weight_is_left_in_peace_by_them(workshop: Any) -> None:
    assert "None of 5 rules had anything to say." in summary(workshop, 0.05)


WATCH: dict[str, Any] = {
    "every": 1,
    "prompts": 2,
    "pictures": 2,
    "rules": [{"kind": "limit", "metric": "saturation", "above": 0.0, "evaluations": 3, "action": "stop"}],
}


def test_a_rule_that_stops(workshop: Any, read_rows: Callable[[Path], list[dict[str, float]]]) -> None:
    """Exit code 4, one line, a checkpoint and a report; what went before a resume counts as if there had been none."""
    workshop.recipe["watch"] = WATCH | {"rules": [WATCH["rules"][0] | {"start": 1}]}
    stopped = workshop.run(processes=2)
    assert stopped.codes == [4, 4]
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
