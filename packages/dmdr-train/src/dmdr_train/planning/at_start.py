"""The plan of a run that begins, in a few lines, for the GPU that it runs on."""

import torch

from dmdr_train.planning.checkpointing import MOST, fitted, with_checkpointing
from dmdr_train.planning.gpus import GPU, GPUS
from dmdr_train.planning.plan import USABLE, make_plan
from dmdr_train.planning.table import short_lines
from dmdr_train.recipe.schema import Recipe


def plan_lines(settings: Recipe, device: torch.device, world: int) -> list[str]:
    """The plan of a run on `world` GPUs of this kind; nothing on a CPU, where counting takes as long as some steps.

    No failure to plan ends a run: a line tells of it.
    """
    if device.type != "cuda":
        return []
    try:
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        plan = make_plan(settings, gpu_called(torch.cuda.get_device_name(device)), world, gpu_memory=memory)
    except Exception as error:  # of a plug-in's family, which only its author knows
        return [f"none ({type(error).__name__}: {error})"]
    return short_lines(plan)


def automatic_checkpointing(settings: Recipe, device: torch.device, world: int) -> tuple[list[str], str]:
    """What `memory.gradient_checkpointing: auto` becomes on this device, and a line that says so.

    On a CPU it is nothing. Where the recipe cannot be planned, it is all.
    """
    why = ""
    if device.type != "cuda":
        chosen = with_checkpointing(settings, [])
    else:
        try:
            chosen, _ = fitted(settings, world, int(torch.cuda.get_device_properties(device).total_memory * USABLE))
        except Exception as error:  # of a plug-in's family, which only its author knows
            chosen, why = with_checkpointing(settings, MOST), f", since there is no plan ({error})"
    parts = list(chosen.memory.gradient_checkpointing)
    return parts, f"memory.gradient_checkpointing: auto is {', '.join(parts) or 'none'}{why}"


def gpu_called(name: str) -> GPU:
    """The GPU of the table in the name that torch gives a device; an H100 for one that is not there."""
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name), GPUS["h100"])
