"""The end of a launcher ends the run: its remaining processes save and release the folder."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from dmdr_train.checkpoint.find import checkpoints_in
from dmdr_train.checkpoint.manifest import verify

RUN = str(Path(__file__).parents[2] / "packages/dmdr-train/run.py")


def descendants(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(("launcher", "number"), [("deepspeed", signal.SIGTERM), ("torchrun", signal.SIGKILL)])
def test_the_end_of_a_launcher_ends_the_run(
    workshop: Any,
    launch: Callable[[str, int], list[str]],
    plain_environment: dict[str, str],
    launcher: str,
    number: signal.Signals,
) -> None:
    workshop.recipe["run"] = {"output": "out", "steps": 100_000, "resume": "auto"}
    workshop.recipe["tracking"] = {"log_every": 1, "tensorboard": False}
    workshop.write()
    out, log = workshop.folder / "out", workshop.folder / "log"
    command = [*launch(launcher, 2), RUN, "--config", "recipe.yaml"]
    with log.open("w") as file:
        running = subprocess.Popen(command, cwd=workshop.folder, env=plain_environment, stdout=file, stderr=file)
    started: list[psutil.Process] = []
    try:
        while not (out / "metrics.jsonl").exists():
            assert running.poll() is None, log.read_text()
            time.sleep(0.1)
        started = descendants(running)
        assert len([process for process in started if "LOCAL_RANK" in process.environ()]) >= 2
        running.send_signal(number)
        running.wait(60)
        _, left = psutil.wait_procs(started, timeout=60)
        assert left == []
    finally:
        for process in (*started, running):
            if psutil.pid_exists(process.pid):
                process.kill()
    (checkpoint,) = checkpoints_in(out / "checkpoints")
    verify("run.resume", checkpoint)
    assert (
        f"stopped: by the end of its launcher; saved in out/checkpoints/{checkpoint.name}; start again"
        in log.read_text()
    )
    step = int(checkpoint.name.removeprefix("step-"))
    resumed = workshop.run(f"run.steps={step + 3}").check()  # after the start of the reward, whenever the signal came
    assert f"resuming from out/checkpoints/{checkpoint.name}" in resumed.stderr
