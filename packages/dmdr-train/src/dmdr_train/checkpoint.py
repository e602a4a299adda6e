"""Checkpoints: one folder each, whole or not there.

    checkpoints/step-00000150/
        generator/, guidance/     DeepSpeed's state of the two engines
        average-rank0.safetensors the averaged weights, one file per process
        generator.safetensors     the trained weights of the generator, whole, as they are
        student.safetensors       the same, averaged: what is exported
        fake_score.safetensors    the LoRA of the guidance network
        recipe.yaml
        manifest.json             step, world size, what automatic weights follow, versions of packages, and size and
                                  sha256 of every file; written last

A run has neither random state nor a place in its data to save (see `dmdr_train.draws` and `.prompts`): its step is
enough.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dmdr_train.average import Average
from dmdr_train.engines import anywhere, gathered
from dmdr_train.errors import UserError, naming
from dmdr_train.files import fingerprint
from dmdr_train.recipe import Recipe
from dmdr_train.recipe_file import dump_recipe
from dmdr_train.resume import MANIFEST, checkpoints_in, read_manifest
from dmdr_train.trainer import Trainer
from dmdr_train.versions import versions

GENERATOR, STUDENT, FAKE_SCORE = "generator.safetensors", "student.safetensors", "fake_score.safetensors"
ENGINES = ("generator", "guidance")


class NotSavedError(Exception):
    """A checkpoint that could not be written; the ones before it are as they were."""


class Writes:
    """Carries out the writes of this process until one fails, and remembers why it did.

    An exception on one process would leave the others waiting for it in the next collective operation.
    """

    def __init__(self) -> None:
        self.error: str | None = None

    def __call__(self, write: Callable[[], object]) -> None:
        if self.error is None:
            try:
                write()
            except (OSError, RuntimeError, SafetensorError) as error:
                self.error = _reason(error)


def _reason(error: BaseException) -> str:
    """What the operating system said, which torch wraps into an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)


def save(folder: Path, settings: Recipe, trainer: Trainer, average: Average) -> Path:
    """Write a checkpoint beside the others and rename it into place when it is whole; every process calls this.

    Raises:
        NotSavedError: on every process, if one of them could not write; what it had written is removed.
    """
    final = folder / f"step-{trainer.step:08d}"
    partial = folder / f".{final.name}.partial"
    write = Writes()
    if trainer.rank == 0:
        write(lambda: _empty(partial))
    _together(write, final, partial)
    for name, engine in _engines(trainer).items():
        engine.checkpoint_engine.save = lambda state_dict, path: write(lambda: _save_state(state_dict, path))
        engine._copy_recovery_script = lambda *_: None
        engine.save_checkpoint(str(partial), tag=name, save_latest=False, exclude_frozen_parameters=True)
    if average.state:
        write(lambda: save_file(average.state, partial / f"average-rank{trainer.rank}.safetensors"))
    save_weights(partial / GENERATOR, trainer.generator.module, write)
    save_weights(partial / FAKE_SCORE, trainer.guidance.module, write)
    with average.applied():
        save_weights(partial / STUDENT, trainer.generator.module, write)
    _together(write, final, partial)
    if trainer.rank == 0:
        write(lambda: _finish(partial, final, settings, trainer))
    _together(write, final, partial)
    return final


def _empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    for name in ENGINES:
        (partial / name).mkdir(parents=True)


def _together(write: Writes, final: Path, partial: Path) -> None:
    """Go on if every process could write."""
    if not anywhere(write.error is not None):
        return
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    reason = write.error or "another process could not write"
    raise NotSavedError(f"{final} could not be written ({reason}); the checkpoints before it are whole")


def _save_state(state: Any, path: str) -> None:
    with open(path, "wb") as file:  # torch on its own does not say why it could not write
        torch.save(state, file)


def _finish(partial: Path, final: Path, settings: Recipe, trainer: Trainer) -> None:
    """Write recipe and manifest, and give the folder its name."""
    (partial / "recipe.yaml").write_text(dump_recipe(settings), encoding="utf-8")
    files = {str(p.relative_to(partial)): fingerprint(p) for p in sorted(partial.rglob("*")) if p.is_file()}
    manifest = {
        "step": trainer.step,
        "world_size": trainer.world,
        "weights": {o.name: [o.weight.own, o.weight.other] for o in trainer.objectives},
        "versions": versions(),
        "files": files,
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    if final.exists():
        remove(final)
    os.replace(partial, final)


def remove(path: Path) -> None:
    """Take a checkpoint out of sight, then away: half of one never has its name."""
    hidden = path.with_name(f".{path.name}.removed")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """What an earlier process had begun to write or to remove in a run's folder when it was killed."""
    for pattern in ("checkpoints/.step-*", ".student.partial", ".*.*.partial", "samples/.*.*.partial"):
        for path in run.glob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def prune(folder: Path, step: int, last: int, every: int, best: int | None) -> None:
    """Remove the checkpoints that none of these keeps, and those after `step`, which are of steps to be made again.

    Args:
        step: of the newest.
        last: number of the newest to keep.
        every: keep those at a multiple of so many steps; 0 for none.
        best: a step to keep.
    """
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints_in(folder)}
    past = [number for number in found if number <= step]
    kept = {*past[-last:], best, *(number for number in past if every and number % every == 0)}
    for number, path in found.items():
        if number not in kept:
            remove(path)


def save_weights(path: Path, network: nn.Module, write: Callable[[Callable[[], object]], None] | None = None) -> None:
    """The trainable parameters of a network, whole and in float32; rank 0 writes."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with gathered(trained.values()):
        if dist.get_rank() == 0:
            whole = {name: p.detach().float().cpu().contiguous() for name, p in trained.items()}
            (write or _call)(lambda: save_file(whole, path))


def _call(write: Callable[[], object]) -> None:
    write()


def load_weights(key: str, path: Path, network: nn.Module) -> None:
    """Put saved weights into a network that has them as trainable parameters.

    Raises:
        UserError: names or shapes differ.
    """
    if not path.is_file():
        raise UserError(key, f"{path} is missing; give another checkpoint")
    check_weights(key, path, network)
    trained = dict(network.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path).items():
            trained[name].copy_(value)


def check_weights(key: str, path: Path, network: nn.Module) -> None:
    """Compare names and shapes of saved weights with the network's trainable parameters.

    Raises:
        UserError: for the first that differs.
    """
    try:
        with naming(key), safe_open(path, "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except UserError as error:
        raise UserError(key, f"{path} is damaged ({error.__cause__}); give another checkpoint") from None
    ours = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in network.named_parameters() if p.requires_grad}
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            raise UserError(
                key,
                f"{path} is of another model: {name} has shape {saved.get(name)} there and {ours.get(name)} here; "
                f"give one of this model",
            )


def load(path: Path, trainer: Trainer, average: Average) -> None:
    """Restore both engines, the average and the step.

    Raises:
        UserError: the number of processes or the model differs, or a file holds more than weights.
    """
    manifest = read_manifest("run.resume", path)
    if manifest["world_size"] != trainer.world:
        raise UserError(
            "run.resume",
            f"{path} was written by {manifest['world_size']} processes and this run has {trainer.world}; "
            f"start {manifest['world_size']}",
        )
    check_weights("run.resume", path / GENERATOR, trainer.generator.module)
    check_weights("run.resume", path / FAKE_SCORE, trainer.guidance.module)
    for name, engine in _engines(trainer).items():
        with torch.serialization.safe_globals(_deepspeed_types()):
            engine.checkpoint_engine.load = _load_weights_only
            engine.load_checkpoint(str(path), tag=name, load_module_strict=False)
    if average.state:
        saved = load_file(path / f"average-rank{trainer.rank}.safetensors")
        for name, value in average.state.items():
            value.copy_(saved[name])
    for objective in trainer.objectives:
        objective.weight.own, objective.weight.other = manifest["weights"][objective.name]
    trainer.step = manifest["step"]


def _engines(trainer: Trainer) -> dict[str, Any]:
    return {name: getattr(trainer, name) for name in ENGINES}


def _load_weights_only(path: str, map_location: Any = None) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        # torch's own text advises weights_only=False.
        raise UserError(
            "run.resume", f"{path} holds more than weights, none of which was run; resume from another checkpoint"
        ) from None


def _deepspeed_types() -> list[Any]:
    """The classes that DeepSpeed itself puts into its files; nothing else is unpickled."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
