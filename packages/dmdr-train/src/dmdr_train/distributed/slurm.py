"""Translate the environment variables of Slurm's `srun` to those of torch's launchers. Imports no torch."""

import os
import re
import sys
from collections.abc import MutableMapping


def join_step(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for a process of a step that `srun` started.

    Nothing is set if a launcher has set RANK, nor outside of a step: a batch script has no SLURM_STEP_NUM_TASKS.
    The processes meet on the step's first node, at a port computed from the job's number; existing values of
    MASTER_ADDR and MASTER_PORT are kept. If each task sees only some of the devices (`--gpus-per-task`), LOCAL_RANK
    counts the devices that the task sees.
    """
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    devices = environment.get("CUDA_VISIBLE_DEVICES")
    local = int(environment["SLURM_LOCALID"])
    environment["LOCAL_RANK"] = str(local % len(devices.split(",")) if devices else local)
    environment.setdefault("MASTER_ADDR", first_node(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment["SLURM_JOB_ID"]) % 10_000))
    if environment["RANK"] == "0":
        place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        print(f"Slurm: {environment['WORLD_SIZE']} processes, which meet at {place}", file=sys.stderr, flush=True)


def first_node(nodes: str) -> str:
    """Return the first name of a Slurm node list: n007 for `n[007-012,20],login`."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]
