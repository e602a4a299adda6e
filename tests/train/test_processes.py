"""The process group: how it is joined, and that every way out of a command leaves it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from dmdr_train.distributed.process_group import processes, start_processes

# Runs, dry runs and evaluations of which each ends in its own way; then what is left of the group.
ENDINGS = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from dmdr_train.run import evaluate_run, runner
from dmdr_train.base.errors import StoppedError, UserError
from dmdr_train.base.exit_codes import LOST, STOPPED
from dmdr_train.recipe.schema import Recipe

settings = Recipe.model_validate(json.loads(sys.argv[1]))
ways = {
    "run": lambda: runner.run(settings),
    "dry run": lambda: runner.dry_run(settings),
    "evaluate": lambda: evaluate_run.evaluate_run(settings, Path("nowhere"), ["teacher"]),
}
errors = [UserError("model.path", "is of another family"), StoppedError(STOPPED, "by SIGTERM"), SystemExit(3),
          StoppedError(LOST, "rank 1 ended"), RuntimeError("out of memory"), KeyboardInterrupt()]
for name, way in ways.items():
    for error in errors:
        def fail(*_, **__):
            assert dist.is_initialized()
            raise error
        runner.build = evaluate_run.load_family = fail
        try:
            way()
        except BaseException as raised:
            print(json.dumps([name, type(error).__name__, raised is error, dist.is_initialized()]))
"""
# Two processes that leave a group, which calls itself NCCL's, in the way that the first argument says.
LEAVING = """
import json, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from dmdr_train.distributed import process_group
from dmdr_train.base.errors import UserError

how, done = sys.argv[1], []
process_group.LEAVING = 30.0 if how == "all fail" else 0.5
try:
    with process_group.processes(torch.device("cpu")):
        dist.all_reduce(torch.ones(1))
        rank = dist.get_rank()
        if how != "gloo":
            dist.get_backend = lambda: "nccl"
        dist.destroy_process_group = lambda: done.append("destroy")
        dist.distributed_c10d._abort_process_group = lambda: done.append("abort")
        if how == "one fails" and rank == 0:
            while not Path("left").exists():
                time.sleep(0.01)
            sys.exit(0)
        if how == "all fail" and rank == 1:
            time.sleep(0.5)
        if rank == 1 or how == "all fail":
            raise UserError("model.path", "is of another family")
except UserError as error:
    done.append(str(error))
    Path("left").touch()
os.write(1, (json.dumps([rank, *done]) + "\\n").encode())  # in one piece: the other process writes, too
"""


@pytest.mark.parametrize(
    ("device", "backend", "device_id"),
    [(torch.device("cpu"), "gloo", None), (torch.device("cuda", 3), "nccl", torch.device("cuda", 3))],
)
def test_nccl_knows_its_device(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, backend: str, device_id: torch.device | None
) -> None:
    """Without it, every barrier guesses one and warns. The second group is made of the first and inherits it."""
    asked: list[Any] = []
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "init_process_group", lambda *given, **named: asked.append((given, named)))
    monkeypatch.setattr(dist, "new_group", lambda *given, **named: asked.append((given, named)))
    monkeypatch.setattr(get_accelerator(), "set_device", asked.append, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    monkeypatch.setattr(deepspeed.utils.groups, "_WORLD_GROUP", None)
    start_processes(device, 60.0)
    *chosen, (given, named), (ranks, more) = asked
    assert chosen == ([] if device_id is None else [3])
    assert given == (backend,)
    assert (named["device_id"], named["rank"], named["world_size"]) == (device_id, 3, 4)
    assert (list(ranks[0]), more) == ([0, 1, 2, 3], {})


def test_a_group_that_is_there_stays(one_process: None) -> None:
    with processes(torch.device("cpu")):
        pass
    with pytest.raises(ZeroDivisionError), processes(torch.device("cpu")):
        raise ZeroDivisionError
    assert dist.is_initialized()


def test_every_way_out_leaves_the_group(
    python: Callable[..., Any], make_recipe_dict: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    evaluation = {"classifier": "classifier", "reference": "shapes", "pictures": 100}
    recipe = make_recipe_dict(tracking__evaluation=evaluation)
    (tmp_path / "endings.py").write_text(ENDINGS)
    said = python("endings.py", json.dumps(recipe), folder=tmp_path).check().stdout
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == 18
    assert [[name, kind] for name, kind, same, there in found if there or not same] == []


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("all fail", ["destroy", "model.path: is of another family"], ["destroy", "model.path: is of another family"]),
        ("one fails", None, ["abort", "model.path: is of another family"]),
        ("gloo", ["destroy"], ["model.path: is of another family"]),
    ],
)
def test_who_leaves_waits_for_nobody_that_stays(
    python: Callable[..., Any], tmp_path: Path, how: str, first: Any, second: Any
) -> None:
    """And nothing takes the place of the error."""
    (tmp_path / "leaving.py").write_text(LEAVING)
    said = python("leaving.py", how, folder=tmp_path, processes=2).check().stdout
    found = {rank: done for rank, *done in map(json.loads, said.splitlines())}
    assert (found.get(0), found[1]) == (first, second)


def test_an_error_of_leaving_does_not_hide_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def failing(failed: bool = False) -> None:
        calls.append(failed)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    there = iter([False, True])
    module = "dmdr_train.distributed.process_group."
    monkeypatch.setattr(module + "dist", SimpleNamespace(is_initialized=lambda: next(there)))
    monkeypatch.setattr(module + "start_processes", lambda *_: None)
    monkeypatch.setattr(module + "end_processes", failing)
    with pytest.raises(ZeroDivisionError), processes(torch.device("cpu")):
        raise ZeroDivisionError
    assert calls == [True]
