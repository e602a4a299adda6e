"""The space that a run will take on its disk, worked out before its first step."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmdr_models.networks.lora import LoRANetwork
from dmdr_models.networks.step_loras import StepLoRAs
from torch import nn

from dmdr_train.base.errors import UserError
from dmdr_train.base.folders import nearest
from dmdr_train.checkpoint.find import checkpoints_in, step_of
from dmdr_train.checkpoint.retention import kept_steps
from dmdr_train.distributed.deepspeed_internals import full_size
from dmdr_train.recipe.schema import Optim, Recipe, Run
from dmdr_train.reporting.model_card import keeps_lora
from dmdr_train.training.trainer import Trainer

FILE, RECORD, NAME = 8192, 1100, 256
"""Bytes, at most, that a file takes without its tensors; the optimizer's state of a tensor; and a tensor's name."""


@dataclass(frozen=True)
class Space:
    """What a run needs of its disk.

    Args:
        folder: of the run.
        checkpoint: bytes of one checkpoint.
        most: checkpoints that are there at once, at most, the one that is being written included.
        needed: bytes that the disk must have left.
        free: bytes that it has left.
    """

    folder: Path
    checkpoint: int
    most: int
    needed: int
    free: int

    def __str__(self) -> str:
        count = f"up to {self.most} are" if self.most > 1 else "1 is"
        return (
            f"a checkpoint takes {_gb(self.checkpoint)}, {count} there at once ({_gb(self.most * self.checkpoint)}); "
            f"with the student, the run needs {_gb(self.needed)}, and {_gb(self.free)} are free"
        )

    def check(self) -> str:
        """The line to print at the start of a run.

        Raises:
            UserError: the disk has too little space.
        """
        if self.needed > self.free:
            fix = "make space, give another run.output, or keep fewer (run.keep_last, run.keep_every)"
            raise UserError("run.output", f"{self.folder} is on a disk that is too small: {self}; {fix}")
        return str(self)


def space(settings: Recipe, trainer: Trainer) -> Space:
    """What the rest of a run, from the step that its trainer is at, needs of the disk that `run.output` is on.

    The numbers are upper bounds. Not counted are samples, logs and the report, which are small.
    """
    folder = Path(settings.run.output)
    size = checkpoint_bytes(trainer.generator, trainer.guidance, settings, trainer.world)
    found = [step_of(path) for path in checkpoints_in(folder / "checkpoints")]
    most, left = checkpoints_at_once(settings.run, trainer.step, found)
    student = student_bytes(trainer.generator.module, keeps_lora(settings, trainer.family))
    needed = max(size * (most - len(found)), size * (left - len(found)) + student)
    half_done = sum(path.stat().st_size for path in folder.glob("checkpoints/.step-*/**/*") if path.is_file())
    return Space(folder, size, most, needed, shutil.disk_usage(nearest(folder / "checkpoints")).free + half_done)


def checkpoints_at_once(run: Run, step: int, found: Iterable[int] = ()) -> tuple[int, int]:
    """How many checkpoints a run has on its disk: at most, the one that is being written included; and at its end.

    Args:
        step: that the run begins or goes on at.
        found: the steps of the checkpoints that are there.
    """
    there = set(found)
    most, extra = len(there), int(run.keep_best is not None)  # the best may be any, beside those that stay anyway
    every = run.checkpoint_every or run.steps
    for saved in [*range(step - step % every + every, run.steps, every), *([run.steps] if step < run.steps else [])]:
        most = max(most, len(there) + 1 + extra)
        there = kept_steps({*there, saved}, saved, run.keep_last, run.keep_every)
    return most, len(there) + extra


def checkpoint_bytes(generator: Any, guidance: Any, settings: Recipe, world: int) -> int:
    """The size of a checkpoint, at most: what the engines write, the weights and the average, see `Saving`.

    Args:
        generator, guidance: the two engines.
        world: number of processes.
    """
    optim, engines = settings.optim, (generator, guidance)
    weights = [sum(sizes) * 4 + len(sizes) * NAME + FILE for sizes in map(_trained, engines)]
    texts = 2 * FILE
    average = 0
    if optim.ema is not None:  # one file, or with ZeRO a file of every process, which has all names
        files = world if optim.zero_stage else 1
        average = 4 * sum(_trained(generator)) + files * (len(_trained(generator)) * NAME + FILE)
    engines_bytes = sum(engine_bytes(engine, optim, world) for engine in engines)
    copies = 2 + len(settings.needing("frozen_copy"))  # generator, student, and what objectives keep
    return engines_bytes + copies * weights[0] + weights[1] + average + texts


def engine_bytes(engine: Any, optim: Optim, world: int) -> int:
    """What all processes together write of a DeepSpeed engine, at most.

    These are its trained weights and buffers in the precision that it computes in, master copies of the weights in
    float32 unless that is the precision, and two moments of each. ZeRO-3 keeps the weights as master copies alone. The
    shares of ZeRO are filled up with zeros to the same size.
    """
    stage, sizes = optim.zero_stage, _trained(engine)
    parameters = {name for name, _ in engine.module.named_parameters()} if stage == 3 else set()
    saved = engine.module_state_dict(exclude_frozen_parameters=True)
    names = FILE + len(sizes) * NAME
    model = sum(tensor.nbytes for name, tensor in saved.items() if name not in parameters) + names
    master = 0 if stage == 0 and optim.precision == "fp32" else 4 * sum(sizes)
    state = master + sum(moment_bytes(size, optim.eight_bit) for size in sizes)
    if stage == 0:
        return model + state + len(sizes) * RECORD
    filling = 12 * 2 * len(sizes)
    return model * (world if stage == 3 else 1) + state + world * (filling + names)


def moment_bytes(size: int, eight_bit: bool) -> int:
    """The two moments of a tensor of so many elements.

    In 8 bits, bitsandbytes keeps a byte per element, a float32 per block of 256 and a table of 256 float32 for each;
    tensors of fewer than 4096 elements stay in float32.
    """
    if not eight_bit or size < 4096:
        return 8 * size
    return 2 * (size + 4 * -(-size // 256) + 4 * 256)


def student_bytes(generator: nn.Module, as_lora: bool) -> int:
    """The exported student, at most: in float32 a LoRA that stays one, or the whole network."""
    if isinstance(generator, LoRANetwork | StepLoRAs) and as_lora:
        copies = 3  # for PEFT, for diffusers and for programs that read kohya's layout
        return copies * 4 * sum(full_size(p) for p in generator.parameters() if p.requires_grad)
    network = generator.base if isinstance(generator, LoRANetwork | StepLoRAs) else generator
    return 4 * sum(map(full_size, network.parameters()))


def _trained(engine: Any) -> list[int]:
    """The number of elements of each trained parameter."""
    return [full_size(p) for p in engine.module.parameters() if p.requires_grad]


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
