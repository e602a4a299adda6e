"""The default rules notice a reward that is asked for too much and leave a healthy one in peace; what a stop leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = (
    "optim.generator.schedule=constant",
    "run.checkpoint_every=0",
    "run.device=cpu",
    "tracking.tensorboard=false",
    "tracking.evaluation=null",
    "tracking.samples.count=2",
    "tracking.samples.every=0",
)


def warnings(workshop: Any, demo: str, *changes: str) -> list[str]:
    """The alarms in the report of a short run of a built-in problem."""
    workshop.run("run.output=out", *QUICK, *changes, config=demo).check()
    summary = (workshop.folder / "out/summary.md").read_text(encoding="utf-8")
    found = [line for line in summary.splitlines() if line.startswith("- early warning at step")]
    assert bool(found) != (" rules had anything to say." in summary)
    return found


# -- the built-in problem: ten classes, and a classifier that is asked for a clearer picture of each


@pytest.mark.parametrize(("weight", "said"), [(1000.0, True), (0.25, False)])
def test_an_absurd_weight_of_the_demos_reward_is_noticed_and_its_own_is_not(
    workshop: Any, weight: float, said: bool
) -> None:
    """The pictures of a class grow alike. Its default rules and its weight, and less time."""
    changes = (
        "guidance.dynamics.steps=100",
        "objectives.1.start=30",
        "run.steps=100",
        "optim.ema=0.9",
        "watch.every=10",
    )
    found = warnings(workshop, "demo", f"objectives.1.weight={weight}", *changes)
    assert [": limit: diversity" in line or ": reward_hacking: " in line for line in found] == [True] * len(found)
    assert bool(found) == said


# -- the built-in text-to-image problem, whose student starts here as its teacher, so that it needs no cold start

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
    "optim.ema=null",
    "run.steps=12",
    "watch={every: 2, prompts: 4, pictures: 2}",
)


@pytest.mark.parametrize(("weight", "said"), [(1000.0, True), (0.05, False)])
def test_an_absurd_weight_of_brightness_is_noticed_and_a_healthy_one_is_not(
    workshop: Any, weight: float, said: bool
) -> None:
    objectives = f"objectives=[{{kind: distribution_matching}}, {{weight: {weight}, {BRIGHT}}}]"
    assert bool(warnings(workshop, "demo-t2i", objectives, *SHORT)) == said


# -- what a stop leaves

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
