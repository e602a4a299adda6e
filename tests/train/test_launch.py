"""How the processes of a run come together: by Slurm's variables, at an address, over one folder."""

import json
import os
import re
import shlex
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dmdr_train.base import errors
from dmdr_train.base.errors import StoppedError, UserError
from dmdr_train.distributed.slurm import first_node, join_step

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch, yaml
import torch.distributed as dist
from dmdr_train.distributed import lost_process
from dmdr_train.run import runner
from dmdr_train.distributed.deepspeed_engine import make_engine
from dmdr_train.base.errors import StoppedError, UserError
from dmdr_train.recipe.schema import Recipe

def stopped_in_build(settings, device, resumed):
    network = torch.nn.Linear(2, 2)
    engine = make_engine(network, settings.optim, settings.optim.generator, 1, device)
    if dist.get_rank() == 1:
        os.kill(running["build", 0][0], signal.SIGTERM)  # which a launcher sends when it sees that a process is lost
        os.kill(os.getpid(), signal.SIGSTOP)
    engine.backward(engine(torch.ones(1, 2)).sum())
    engine.step()

def process(case, rank, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    settings = Recipe.model_validate(json.loads(sys.argv[1]))
    lost_process.WAIT = 2.0
    runner.build = stopped_in_build
    if case == "folders":
        Path(str(rank)).mkdir()
        os.chdir(str(rank))
    if case == "alone" and rank == 1:
        return None
    try:
        runner.run(settings)
    except (StoppedError, UserError) as error:
        return {"code": getattr(error, "code", 2), "text": str(error), "files": os.listdir()}

running, said = {}, {}
for case in ("build", "folders", "alone"):
    probe = dist.TCPStore("127.0.0.1", 0, 1, True)
    port = probe.port
    del probe
    for rank in range(2):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, json.dumps(process(case, rank, port)).encode())
            os._exit(0)
        os.close(writing)
        running[case, rank] = child, reading
for (case, rank), (child, reading) in running.items():
    if (case, rank) != ("build", 1):
        said.setdefault(case, []).append(json.loads(os.read(reading, 4096) or "null"))
os.kill(running["build", 1][0], signal.SIGKILL)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(
    tmp_path_factory: pytest.TempPathFactory, make_recipe_dict: Any, python: Callable[..., Any]
) -> dict[str, list[Any]]:
    """What two processes say in each case; no launcher ends one of them for the other."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "program.py").write_text(PROGRAM)
    recipe = json.dumps(make_recipe_dict(run__timeout=3.0, optim__batch_size=2))
    done = python("program.py", recipe, folder=folder).check()
    return json.loads(done.stdout.splitlines()[-1])


def test_a_process_lost_while_models_are_built_is_named(said: Any) -> None:
    """It stops in a collective operation of DeepSpeed's, whose time-out is the recipe's as well."""
    (first,) = said["build"]
    assert first["code"] == 69
    assert first["text"].startswith("rank 1 (process ")
    assert " ended, or did not answer in time (Timed out waiting 3000ms" in first["text"]


def test_machines_that_do_not_see_one_folder_are_told_so(said: Any) -> None:
    for outcome in said["folders"]:
        assert outcome["code"] == 2
        assert outcome["text"].startswith("run.output: out of rank 0 (process ")
        assert "is not the folder that rank 1 (process " in outcome["text"]
        assert outcome["files"] == []


def test_processes_that_do_not_meet_say_where(said: Any) -> None:
    first, _ = said["alone"]
    assert first["code"] == 69
    assert first["text"].startswith("rank 0 of 2 did not meet the others at 127.0.0.1:")
    assert "within run.timeout of 3 s (Timed out after" in first["text"]


STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
JOINED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24567"}


@pytest.mark.parametrize(
    ("environment", "joined"),
    [
        (STEP, JOINED),
        (STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, JOINED),
        (STEP | {"CUDA_VISIBLE_DEVICES": "3"}, JOINED | {"LOCAL_RANK": "0"}),
        (STEP | {"MASTER_ADDR": "n", "MASTER_PORT": "9"}, JOINED | {"MASTER_ADDR": "n", "MASTER_PORT": "9"}),
        (STEP | {"RANK": "0"}, {"RANK": "0"}),
        ({name: value for name, value in STEP.items() if "STEP" not in name}, {}),
        ({}, {}),
    ],
    ids=["srun", "all devices", "a device per task", "an address of one's own", "a launcher", "a batch script", "none"],
)
def test_srun_is_a_launcher(environment: dict[str, str], joined: dict[str, str]) -> None:
    given = dict(environment)
    join_step(given)
    assert given == environment | joined


def test_who_is_first_says_where_they_meet(capsys: pytest.CaptureFixture[str]) -> None:
    join_step(STEP | {"SLURM_PROCID": "0"})
    assert capsys.readouterr().err == "Slurm: 8 processes, which meet at gpu07:24567\n"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[007-012,20],login", "n007"), ("n[3,5]-ib,x", "n3-ib"), ("r[1-2]n[00-15]", "r1n00")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("rank", "local", "error", "said"),
    [
        (0, 0, UserError("run.steps", "x"), "error: run.steps: x\n"),
        (8, 0, UserError("run.steps", "x"), "error: run.steps: x\n"),
        (9, 1, UserError("run.steps", "x"), ""),
        (9, 1, StoppedError(69, "x", 9), "stopped: x\n"),
        (9, 1, StoppedError(69, "x"), ""),
        (None, None, StoppedError(69, "x"), "stopped: x\n"),
    ],
)
def test_one_process_of_each_machine_says_why(
    rank: int | None, local: int | None, error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", local)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    with pytest.raises(SystemExit), errors.user_errors():
        raise error
    assert capsys.readouterr().err == said
    assert len(waited) == (said == "")


# -- docs/clusters.md

ROOT = Path(__file__).parents[2]
MANUAL = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")


def test_the_launchers_understand_the_lines_of_the_manual() -> None:
    from deepspeed.launcher.runner import parse_args as deepspeed
    from torch.distributed.run import parse_args as torchrun

    read = {
        "deepspeed": (deepspeed, "user_script", "user_args"),
        "torchrun": (torchrun, "training_script", "training_script_args"),
    }
    seen = []
    for line in MANUAL.splitlines():
        if line.startswith("    ") and line.split()[0] in read:
            launcher, *arguments = shlex.split(line.replace(" N ", " 1 "))
            parse, script, rest = read[launcher]
            options = parse(arguments)
            assert (ROOT / getattr(options, script)).is_file()
            assert getattr(options, rest) == ["--config", "RECIPE", "run.resume=auto"]
            seen.append(launcher)
    assert seen == ["deepspeed", "deepspeed", "torchrun", "torchrun"]


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (65, False), (69, True), (75, True), (137, True)])
def test_the_job_of_the_manual_goes_back_to_the_queue_where_that_helps(code: int, again: bool, tmp_path: Path) -> None:
    (job,) = re.findall(r"    #!/bin/bash\n.*?exit \$code\n", MANUAL, re.DOTALL)
    for name, act in (("srun", f"exit {code}"), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{act}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", textwrap.dedent(job)], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout == ("requeue 7\n" if again else "")
