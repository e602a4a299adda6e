"""Every use of what DeepSpeed does not document: private names, attributes of its parameters, layouts of its files.

A new release may change any of them. `tests/train/test_deepspeed_internals.py` then says which, by name, and this is
the one module to adapt.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
from torch import Tensor, nn

WEIGHTS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""Where the saved states of DeepSpeed's optimizers, of ZeRO stages 1 and 2 and of stage 3, hold the weights."""
MOMENTS = ("base_optimizer_state", "optimizer_state_dict")
"""The same of the state of torch's optimizer inside."""
MODEL_FILES, OPTIMIZER_FILES = "_model_states.pt", "_optim_states.pt"
"""How the names of an engine's files end."""


def forgo_shared_memory() -> None:
    """Do not compile DeepSpeed's shared-memory operation, which training never calls; gloo alone does the work."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def work_in(group: Any) -> None:
    """Let DeepSpeed work in this group; the one that it would make has torch's own time-out."""
    deepspeed.utils.groups._WORLD_GROUP = group


# -- parameters, which ZeRO-3 splits over the processes


def is_split(parameter: nn.Parameter) -> bool:
    """Whether every process holds a share of the parameter, rather than all of it."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_size(parameter: nn.Parameter) -> int:
    """The number of elements of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shard(parameter: nn.Parameter) -> Tensor:
    """What this process holds of a parameter: its part under ZeRO-3, otherwise all of it."""
    split: Any = parameter
    return split.ds_tensor if is_split(split) else parameter.data


def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Put `value` in the place of what `shard` gives."""
    split: Any = parameter
    if is_split(split) and split.ds_status.name == "AVAILABLE":
        split.partition()  # a gathered copy would outlive the change
    shard(parameter).copy_(value)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """The full parameters, where ZeRO-3 has split them over processes; changes made on rank 0 are not kept."""
    parameters = list(parameters)
    if any(is_split(p) for p in parameters):
        return deepspeed.zero.GatheredParameters(parameters)
    return nullcontext()


# -- checkpoints


def save_engine(engine: Any, folder: Path, name: str, write: Callable[[Any, Path], object]) -> None:
    """Save the trained state of an engine to folder/name.

    Args:
        write: is given the content of each file and its path.
    """
    engine.checkpoint_engine.save = lambda state_dict, path: write(state_dict, Path(path))
    engine._copy_recovery_script = lambda *_: None  # a program that would convert the files
    engine.save_checkpoint(str(folder), tag=name, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: Any, folder: Path, name: str, read: Callable[..., Any], model: Path | None = None) -> None:
    """Load what `save_engine` saved.

    Args:
        read: returns the content of a file; called with its path, and perhaps a `map_location`.
        model: the file of the model's state, if another number of processes saved it; stage 3 would look for a file of
            every rank.
    """
    engine.checkpoint_engine.load = read
    if model is not None:
        engine._get_all_ckpt_names = lambda *_: [str(model)]
    engine.load_checkpoint(str(folder), tag=name, load_module_strict=False)


def saved_types() -> list[Any]:
    """The classes that DeepSpeed itself puts into its files; nothing else is unpickled."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def layout(engine: Any) -> tuple[list[int], list[int], int]:
    """The pieces, flats and align of `reshard_zero.Cuts`, of an engine with ZeRO 1, 2 or 3."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        groups = optimizer.fp16_groups
        return [full_size(p) for group in groups for p in group], [len(group) for group in groups], 1
    sizes = [sum(p.numel() for p in group) for group in optimizer.bit16_groups]
    return sizes, [1] * len(sizes), optimizer.nccl_start_alignment_factor
