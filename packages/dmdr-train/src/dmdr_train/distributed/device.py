"""Choose the device of this process; the table of precisions."""

import os

import torch
from deepspeed.accelerator import get_accelerator

from dmdr_train.base.errors import UserError
from dmdr_train.recipe.schema import Optim, Run

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def kind_of_device(run: Run) -> str:
    """The kind of device that a recipe asks for, such as cpu or cuda; what is there stands for auto."""
    return get_accelerator().device_name() if run.device == "auto" else run.device


def choose_device(run: Run, precision: str, eight_bit: bool = False) -> torch.device:
    """Return the device of this process.

    Raises:
        UserError: the recipe asks for cuda and there is none, or for fp16 or an 8-bit optimizer on a CPU.
    """
    found = get_accelerator().device_name()  # chosen by DeepSpeed, or by DS_ACCELERATOR, at import
    if run.device == "cuda" and found != "cuda":
        raise UserError("run.device", "cuda is not available here; use cpu or auto")
    if "cpu" in (run.device, found):
        if precision == "fp16":
            raise UserError("optim.precision", "fp16 does not train on a CPU; use fp32 or bf16")
        if eight_bit:
            raise UserError("optim.eight_bit", "true needs a GPU and there is none here; set it to false")
        return torch.device("cpu")
    return torch.device(found, int(os.environ.get("LOCAL_RANK", "0")))


def allow_tf32(optim: Optim, device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32, if the recipe says so. On a CPU nothing changes."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if optim.tf32 else "highest")
