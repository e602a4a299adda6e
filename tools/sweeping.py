"""Train a built-in recipe several times: code that the sweeps of both problems share."""

import json
import os
import subprocess
import time
from pathlib import Path

from dmdr_train.evaluation.scores import Scores, read_scores

RUN = Path(__file__).parents[1] / "packages/dmdr-train/run.py"
PORT = 29600  # of the first run; each further run takes the next port


def train(
    recipe: str, output: Path, seed: int, overrides: list[str], processes: int = 2, port: int = PORT
) -> dict[str, Scores]:
    """Run a recipe on CPUs unless it is complete; write its duration to seconds.json beside its scores."""
    if not (output / "summary.md").exists():
        launcher = ["deepspeed", "--num_accelerators", str(processes), "--master_port", str(port)]
        command = [*launcher, str(RUN), "--config", recipe]
        command += [f"run.output={output}", f"run.seed={seed}", *overrides]
        start = time.time()
        with (output.parent / f"{output.name}.log").open("w") as log:
            subprocess.run(
                command, check=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "DS_ACCELERATOR": "cpu"}
            )
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        trained = rows[-1]["train_seconds"]
        (output / "seconds.json").write_text(json.dumps({"train": trained, "all": time.time() - start}))
    return read_scores(output)


def training_seconds(output: Path) -> float:
    return json.loads((output / "seconds.json").read_text())["train"]
