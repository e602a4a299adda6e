"""The only module that uses undocumented parts of DeepSpeed: private names, parameter attributes, file layouts.

A new release may change any of them. `tests/train/test_deepspeed_internals.py` then fails and names the part, and only
this module needs to be adapted.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

WEIGHTS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""Keys of the weights in the saved states of DeepSpeed's optimizers: for ZeRO stages 1 and 2, and for stage 3."""
MOMENTS = ("base_optimizer_state", "optimizer_state_dict")
"""Keys of the inner torch optimizer's state, in the same order."""
MODEL_FILES, OPTIMIZER_FILES = "_model_states.pt", "_optim_states.pt"
"""Endings of the names of an engine's files."""


def forgo_shared_memory() -> None:
    """Keep DeepSpeed from compiling its shared-memory operation, which training never calls; gloo is sufficient."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def work_in(group: Any) -> None:
    """Make DeepSpeed use this process group; its own group would have torch's default time-out."""
    deepspeed.utils.groups._WORLD_GROUP = group


# -- parameters, which ZeRO-3 splits over the processes


def is_split(parameter: nn.Parameter) -> bool:
    """Return whether every process holds a share of the parameter instead of all of it."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_size(parameter: nn.Parameter) -> int:
    """Return the number of elements of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shard(parameter: nn.Parameter) -> Tensor:
    """Return the part of a parameter that this process holds: its share with ZeRO-3, otherwise all of it."""
    split: Any = parameter
    return split.ds_tensor if is_split(split) else parameter.data


def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite the part of a parameter that `shard` returns, or the first elements of this part.

    Args:
        value: the elements, in the order of the part.
    """
    split: Any = parameter
    if is_split(split) and split.ds_status.name == "AVAILABLE":
        split.partition()  # a gathered copy would outlive the change
    shard(parameter).view(-1)[: value.numel()].copy_(value.flatten())


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Return a context in which ZeRO-3's split parameters are complete; changes to them are not kept."""
    parameters = list(parameters)
    if any(is_split(p) for p in parameters):
        return deepspeed.zero.GatheredParameters(parameters)
    return nullcontext()


# -- master weights


def master_parts(engine: Any) -> dict[str, tuple[int, Tensor]]:
    """Return the part of each trained parameter's master copy that this process holds, by the parameter's name.

    The optimizer updates the master copy, in float32. The network computes with a copy of it in its own precision.

    Args:
        engine: the DeepSpeed engine; or a module, whose parameters are their own master copies.

    Returns:
        The position of the part in the flattened parameter, and the part itself, flat. It shares the memory of the
        optimizer, so that writing to it changes the master copy.
    """
    optimizer = getattr(engine, "optimizer", None)
    copies: dict[nn.Parameter, Tensor] = {}  # of half precision without ZeRO
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        copies = dict(zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True))
    named = getattr(engine, "module", engine).named_parameters()
    return {name: _master_part(optimizer, p, copies.get(p, p)) for name, p in named if p.requires_grad}


def _master_part(optimizer: Any, parameter: Any, copy: Tensor) -> tuple[int, Tensor]:
    if is_split(parameter):
        part, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=True)
        start = min(parameter.ds_numel, dist.get_rank() * part.numel())
        return start, part.detach()[: parameter.ds_numel - start]  # without the zeros that fill up the last parts
    if not hasattr(parameter, "_hp_mapping"):
        return 0, copy.detach().view(-1)
    mapping = parameter._hp_mapping
    if mapping is None:  # all of it belongs to other processes
        return 0, torch.empty(0, device=parameter.device)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment().detach()


def check_by_norm(engine: Any) -> None:
    """Let the norm of the gradients alone decide whether they are finite.

    DeepSpeed computes this norm and skips the update if it is not finite. Before that it reads the gradients
    themselves, for which it waits for the device: in half precision without ZeRO once per parameter, and with ZeRO 1
    and 2 once. A DeepSpeed whose ZeRO does not look at the norm keeps its own check.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.overflow_checker.check = lambda: False
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and hasattr(stage_1_and_2, "is_invalid_grad_norm"):
        optimizer.check_overflow = lambda **_: None


# -- checkpoints


def save_engine(engine: Any, folder: Path, name: str, write: Callable[[Any, Path], object]) -> None:
    """Save the trained state of an engine to folder/name.

    Args:
        write: called with the content and the path of each file.
    """
    engine.checkpoint_engine.save = lambda state_dict, path: write(state_dict, Path(path))
    engine._copy_recovery_script = lambda *_: None  # the script that converts the files is not needed
    engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: Any, folder: Path, name: str, read: Callable[..., Any], model: Path | None = None) -> None:
    """Load the state that `save_engine` saved.

    Args:
        read: returns the content of a file; called with its path, and perhaps a `map_location`.
        model: the file of the model's state, if another number of processes saved it; without it, stage 3 would look
            for a file of every rank.
    """
    engine.checkpoint_engine.load = read
    if model is not None:
        engine._get_all_ckpt_names = lambda *_: [str(model)]
    engine.load_checkpoint(str(folder), tag=name, load_module_strict=False)


def model_state_for(world: int, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file of model states as `world` processes would have saved it."""
    return {**content, "dp_world_size": world}


def optimizer_state(content: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the optimizer in the content of one of the `OPTIMIZER_FILES`."""
    return content["optimizer_state_dict"]


def optimizer_content(state: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a file with the state of an optimizer; `optimizer_state` reads it."""
    return {"optimizer_state_dict": state}


def saved_types() -> list[Any]:
    """Return the classes that DeepSpeed itself puts into its files; nothing else is unpickled."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def layout(engine: Any) -> tuple[list[int], list[int], int]:
    """Return the fields of `reshard_zero.Cuts` (pieces, flats, align) for an engine with ZeRO 1, 2 or 3."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        groups = optimizer.fp16_groups
        return [full_size(p) for group in groups for p in group], [len(group) for group in groups], 1
    sizes = [sum(p.numel() for p in group) for group in optimizer.bit16_groups]
    return sizes, [1] * len(sizes), optimizer.nccl_start_alignment_factor
