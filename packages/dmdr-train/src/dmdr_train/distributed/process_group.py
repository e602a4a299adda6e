"""Joining and leaving the process group."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger

from dmdr_train.base.errors import StoppedError
from dmdr_train.base.exit_codes import LOST
from dmdr_train.distributed.deepspeed_internals import forgo_shared_memory, work_in

LEAVING = 10.0
"""Seconds in which all other processes must leave the group, too; otherwise it is not destroyed but aborted."""


@contextmanager
def processes(device: torch.device, timeout: float = 1800.0) -> Iterator[None]:
    """Join the process group with `start_processes`, and leave it at the end of the context, also after an error.

    An existing group is used and not left.

    Args:
        timeout: as of `start_processes`.

    Raises:
        StoppedError: the other processes were not met in time.
    """
    ours = not dist.is_initialized()
    try:
        start_processes(device, timeout)
        yield
    except BaseException:
        if ours and dist.is_initialized():
            with suppress(Exception):  # show the first error, not this one
                end_processes(failed=True)
        raise
    if ours:
        end_processes()


def start_processes(device: torch.device, timeout: float = 1800.0) -> None:
    """Join the process group: gloo on CPU, NCCL on CUDA; a plain `python run.py` becomes a group of one.

    Args:
        timeout: seconds to wait for the other processes, here and in every later collective operation.

    Raises:
        StoppedError: the other processes were not met in time.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if device.type == "cpu":
        forgo_shared_memory()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    else:
        get_accelerator().set_device(device.index)
    deepspeed_logger.setLevel("WARNING")
    # DeepSpeed calls operations by names that newer releases of torch have deprecated.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not dist.is_initialized():
        alone = os.environ["WORLD_SIZE"] == "1"
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            dist.init_process_group(
                dist.get_default_backend_for_device(device),  # gloo of the CPU, NCCL of CUDA
                init_method=None if "MASTER_PORT" in os.environ else "tcp://127.0.0.1:0" if alone else None,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=timeout),
                # Otherwise NCCL would guess it from the rank at each barrier. Groups made of this one inherit it.
                device_id=None if device.type == "cpu" else device,
            )
            work_in(dist.new_group(range(world), timedelta(seconds=timeout)))
        except RuntimeError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
            raise StoppedError(
                LOST,
                f"rank {rank} of {world} did not meet the others at {place} within run.timeout of {timeout:g} s "
                f"({str(error).splitlines()[0]}); start all of them, where they reach this address",
                rank,
            ) from error
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def end_processes(failed: bool = False) -> None:
    """Leave the process group without waiting for a process that stays in it.

    NCCL has two ways. `destroy_process_group` completes the operations under way and waits until the other processes
    call it, too. An abort does not wait, and loses messages that are under way. If all processes leave, they destroy
    the group; a process that leaves alone aborts.

    Args:
        failed: this process leaves with an error. gloo has no abort and would wait for operations under way, so in
            this case its group stays until the process ends.
    """
    nccl = dist.get_backend() == "nccl"
    if dist.get_world_size() == 1 or (all_leave() if nccl else not failed):
        dist.destroy_process_group()
    elif nccl:
        dist.distributed_c10d._abort_process_group()


def all_leave() -> bool:
    """Return whether every process calls this within `LEAVING` seconds."""
    store, rank, world = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    met: list[bool] = []

    def meet() -> None:
        with suppress(RuntimeError):
            store.set(f"leaves/{rank}", "")
            store.wait([f"leaves/{other}" for other in range(world)], timedelta(seconds=LEAVING))
            met.append(True)
            store.set(f"left/{rank}", "")
            if rank == 0:  # the store ends with rank 0, so the others must have read it before
                store.wait([f"left/{other}" for other in range(world)], timedelta(seconds=LEAVING))

    thread = threading.Thread(target=meet, daemon=True)  # a store may never answer
    thread.start()
    thread.join(2 * LEAVING + 1)
    return bool(met)
