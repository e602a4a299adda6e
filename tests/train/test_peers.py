"""Three processes, one of which dies or stops; no DeepSpeed, and no launcher that would end the others."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from dmdr_train.base.errors import StoppedError
from dmdr_train.base.exit_codes import LOST
from dmdr_train.distributed.lost_process import RESUME, Peers

PROGRAM = """
import json, os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from dmdr_train.distributed import lost_process
from dmdr_train.base.errors import StoppedError

lost_process.WAIT = 2.0
cases = {"killed": (signal.SIGKILL, 1), "stopped": (signal.SIGSTOP, 2),
         "first killed": (signal.SIGKILL, 0), "first stopped": (signal.SIGSTOP, 0)}

def process(rank, port, number, victim):
    store = dist.TCPStore("127.0.0.1", port, 3, rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=timedelta(seconds=3))
    us = lost_process.Peers()
    try:
        with us.expected():
            for step in range(100):
                if step == 3 and rank == victim:
                    os.kill(os.getpid(), number)
                dist.all_reduce(torch.ones(2))
                time.sleep(0.02)
    except StoppedError as error:
        return {"code": error.code, "speaker": error.speaker, "text": str(error), "victim": us.names[victim]}

running, said = {}, {}
for case, (number, victim) in cases.items():
    probe = dist.TCPStore("127.0.0.1", 0, 1, True)
    port = probe.port
    del probe
    for rank in range(3):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writing, json.dumps(process(rank, port, number, victim)).encode())
            os._exit(0)
        os.close(writing)
        running[case, rank] = child, reading
for (case, rank), (child, reading) in running.items():
    if rank != cases[case][1]:
        said.setdefault(case, {})[rank] = json.loads(os.read(reading, 4096) or "null")
for case, (number, victim) in cases.items():
    os.kill(running[case, victim][0], signal.SIGKILL)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, python: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("peers")
    (folder / "program.py").write_text(PROGRAM)
    return json.loads(python("program.py", folder=folder).check().stdout.splitlines()[-1])


@pytest.mark.parametrize(("case", "victim"), [("killed", 1), ("stopped", 2), ("first killed", 0), ("first stopped", 0)])
def test_a_lost_process_is_named_by_all_that_are_left(said: Any, case: str, victim: int) -> None:
    left = said[case]
    assert sorted(left) == [str(rank) for rank in range(3) if rank != victim]
    for rank, outcome in left.items():
        assert outcome["code"] == 69
        assert outcome["text"].startswith(f"rank {victim} ({outcome['victim']}) ended, or did not answer in time (")
        assert outcome["speaker"] == (0 if victim else int(rank))


def test_an_error_of_our_own_is_left_alone() -> None:
    us = object.__new__(Peers)
    us.rank, us.world = 0, 2
    with pytest.raises(RuntimeError, match=r"^out of memory$"), us.expected():
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    "text",
    [
        "[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer",
        "Application timeout caused pair closure",
        "Operation timed out!",
    ],
)
def test_what_gloo_says_of_a_lost_process_is_known(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    us = object.__new__(Peers)
    us.rank, us.world, us.names, us.fix = 0, 2, ["process 1 on a", "process 2 on b"], RESUME
    monkeypatch.setattr(us, "missing", lambda: [1])
    with pytest.raises(StoppedError, match=r"^rank 1 \(process 2 on b\)"), us.expected():
        raise RuntimeError(text)


def test_a_process_is_named_also_where_cleaning_up_after_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed, at ZeRO 3, cannot put the weights back in the middle of a network."""
    us = object.__new__(Peers)
    us.rank, us.world, us.names, us.fix = 0, 2, ["process 1 on a", "process 2 on b"], RESUME
    monkeypatch.setattr(us, "missing", lambda: [1])

    def lose() -> None:
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:545] Connection reset by peer")
        finally:
            raise RuntimeError("Cannot free a parameter that is active")

    with pytest.raises(StoppedError) as caught, us.expected():
        lose()
    assert caught.value.code == LOST
    assert caught.match(r"^rank 1 \(process 2 on b\) ended, .* \(Connection reset by peer\)")
