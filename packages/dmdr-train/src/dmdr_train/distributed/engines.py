"""Two DeepSpeed engines, one for the generator and one for the guidance network; process set-up."""

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from dmdr_train.base.errors import LOST, StoppedError, UserError
from dmdr_train.recipe.schema import Optim, Optimizer, Run

Decision = TypeVar("Decision")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAVING = 10.0
"""Seconds in which the other processes are to leave the group, too, if it is to be destroyed."""


def choose_device(run: Run, precision: str, eight_bit: bool = False) -> torch.device:
    """The device of this process.

    Raises:
        UserError: cuda was asked for and is not there, or fp16 or an 8-bit optimizer on a CPU.
    """
    found = get_accelerator().device_name()  # what DeepSpeed found, or DS_ACCELERATOR told it, when it was imported
    if run.device == "cuda" and found != "cuda":
        raise UserError("run.device", "cuda is not available here; use cpu or auto")
    if "cpu" in (run.device, found):
        if precision == "fp16":
            raise UserError("optim.precision", "fp16 does not train on a CPU; use fp32 or bf16")
        if eight_bit:
            raise UserError("optim.eight_bit", "true needs a GPU and there is none here; set it to false")
        return torch.device("cpu")
    return torch.device(found, int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def processes(device: torch.device, timeout: float = 1800.0) -> Iterator[None]:
    """The process group, as `start_processes` joins it; this process leaves it at the end, whatever the end is.

    A group that is there already is used and stays.

    Args:
        timeout: as of `start_processes`.

    Raises:
        StoppedError: the others were not met.
    """
    ours = not dist.is_initialized()
    try:
        start_processes(device, timeout)
        yield
    except BaseException:
        if ours and dist.is_initialized():
            with suppress(Exception):  # the first error is the one to see
                end_processes(failed=True)
        raise
    if ours:
        end_processes()


def start_processes(device: torch.device, timeout: float = 1800.0) -> None:
    """Join the process group: gloo on CPU, NCCL on CUDA; a plain `python run.py` becomes a group of one.

    Args:
        timeout: seconds that this waits for the others, and every collective operation after it.

    Raises:
        StoppedError: the others were not met.
    """
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory op that training never calls; gloo alone does the work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    else:
        get_accelerator().set_device(device.index)
    deepspeed_logger.setLevel("WARNING")
    # DeepSpeed calls operations by names that newer releases of torch have changed.
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
                # NCCL would guess it from the rank, at each barrier; groups that are made of this one inherit it.
                device_id=None if device.type == "cpu" else device,
            )
            # DeepSpeed works in a copy of the group, which it would give torch's own time-out.
            deepspeed.utils.groups._WORLD_GROUP = dist.new_group(range(world), timedelta(seconds=timeout))
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
    """Leave the process group; this does not wait for a process that stays in it.

    NCCL has two ways. `destroy_process_group` sends what is under way, and waits for the others to call it, too. An
    abort waits for nobody, and what is under way to the others does not arrive. So the processes destroy the group
    where all of them leave it; one that leaves alone aborts.

    Args:
        failed: this process leaves with an error. gloo has no abort and would wait for what is under way, so its group
            is left to the end of the process then.
    """
    nccl = dist.get_backend() == "nccl"
    if dist.get_world_size() == 1 or (all_leave() if nccl else not failed):
        dist.destroy_process_group()
    elif nccl:
        dist.distributed_c10d._abort_process_group()


def all_leave() -> bool:
    """Whether every process calls this within `LEAVING` seconds."""
    store, rank, world = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    met: list[bool] = []

    def meet() -> None:
        with suppress(RuntimeError):
            store.set(f"leaves/{rank}", "")
            store.wait([f"leaves/{other}" for other in range(world)], timedelta(seconds=LEAVING))
            met.append(True)
            store.set(f"left/{rank}", "")
            if rank == 0:  # the store goes with it: the others are to have read it
                store.wait([f"left/{other}" for other in range(world)], timedelta(seconds=LEAVING))

    thread = threading.Thread(target=meet, daemon=True)  # a store may never answer
    thread.start()
    thread.join(2 * LEAVING + 1)
    return bool(met)


def make_engine(
    network: nn.Module, optim: Optim, settings: Optimizer, updates: int, device: torch.device, offload: bool = False
) -> Any:
    """A DeepSpeed engine over the trainable parameters of `network`, with AdamW and its schedule.

    Args:
        updates: number of optimizer updates in the run, which the schedule spans.
        offload: keep the optimizer's state on the CPU.
    """
    plain = optim.zero_stage == 0 and optim.precision == "fp32"  # where DeepSpeed leaves the optimizer as it is
    optimizer = adamw(optim.eight_bit, plain)(
        [p for p in network.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(settings, updates))
    config: dict[str, Any] = {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": optim.batch_size // dist.get_world_size() // optim.accumulation,
        "gradient_accumulation_steps": optim.accumulation,
        "gradient_clipping": optim.clip,
        "zero_optimization": {"stage": optim.zero_stage, "reduce_scatter": device.type != "cpu"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    if optim.precision != "fp32":
        config[optim.precision] = {"enabled": True}
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=optimizer, lr_scheduler=schedule, config=config, dist_init_required=False
    )
    return engine


def adamw(eight_bit: bool, careful: bool = False) -> Any:
    """The class of the optimizer.

    Args:
        careful: make one that skips steps by itself.
    """
    if eight_bit:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    else:
        kind = torch.optim.AdamW
    return type("Careful" + kind.__name__, (SkipsNotFinite, kind), {}) if careful else kind


class SkipsNotFinite:
    """Leaves out a step whose gradients are not finite, as DeepSpeed's own optimizers do, and tells DeepSpeed so."""

    overflow = False

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]  # type: ignore[attr-defined]
        self.overflow = not all(torch.stack([g.isfinite().all() for g in gradients]).tolist())
        return None if self.overflow else super().step(closure)  # type: ignore[misc]


def learning_rate(settings: Optimizer, updates: int) -> Callable[[int], float]:
    """The factor on the learning rate at an update: linear warm-up, then constant or cosine to 0 at `updates`."""

    def factor(update: int) -> float:
        warm = min(1.0, (update + 1) / (settings.warmup + 1))
        if settings.schedule == "constant":
            return warm
        return warm * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, update / max(1, updates)))).item())

    return factor


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """The full parameters, where ZeRO-3 has split them over processes; changes made on rank 0 are not kept."""
    parameters = list(parameters)
    if any(hasattr(p, "ds_id") for p in parameters):
        return deepspeed.zero.GatheredParameters(parameters)
    return nullcontext()


def shard(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter: its part under ZeRO-3, otherwise all of it."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Put `value` in the place of what `shard` gives."""
    split: Any = parameter
    if hasattr(split, "ds_tensor") and split.ds_status.name == "AVAILABLE":
        split.partition()  # a gathered copy would outlive the change
    shard(parameter).copy_(value)


def mean_over_processes(values: dict[str, float]) -> dict[str, float]:
    """Each value averaged over all processes; every process must call it with the same keys."""
    if dist.get_world_size() == 1:
        return values
    stacked = torch.tensor(list(values.values()), dtype=torch.float64, device=_communicating())
    dist.all_reduce(stacked)
    return dict(zip(values, (stacked / dist.get_world_size()).tolist(), strict=True))


def _communicating() -> torch.device:
    """Where the process group wants its tensors."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else get_accelerator().current_device_name())


def anywhere(flag: bool) -> bool:
    """Whether any process says so; every process must ask."""
    return mean_over_processes({"flag": float(flag)})["flag"] > 0


def said_anywhere(text: str) -> str:
    """What the first of the processes with something to say says; empty if none has."""
    if not anywhere(bool(text)):
        return ""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, text)
    return next(filter(None, said))


def agreed(decide: Callable[[], Decision]) -> Decision:
    """What rank 0 decides, or does, on every process; every process must ask.

    Raises:
        UserError, StoppedError: rank 0's, everywhere.
    """
    if dist.get_world_size() == 1:
        return decide()
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said[0] = decide()
        except (UserError, StoppedError) as error:
            said[1] = error
    dist.broadcast_object_list(said, device=_communicating())
    if said[1] is not None:
        raise said[1]
    return said[0]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows `[n, …]` of every process, `[world · n, …]` in rank order; every process must bring the same n."""
    if dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
