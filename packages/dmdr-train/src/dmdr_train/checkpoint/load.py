"""Load a checkpoint with any number of processes, or weights alone."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dmdr_train.base.errors import UserError, naming
from dmdr_train.checkpoint.manifest import DISCRIMINATOR, ENGINES, FAKE_SCORE, GENERATOR, OBJECTIVE, read_manifest
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.deepspeed_internals import (
    MODEL_FILES,
    OPTIMIZER_FILES,
    full_shape,
    load_engine,
    model_state_for,
    optimizer_content,
    optimizer_state,
    saved_types,
)
from dmdr_train.distributed.reshard_zero import Cuts, reshard
from dmdr_train.training.trainer import Trainer


def load_checkpoint(path: Path, trainer: Trainer, average: Average) -> None:
    """Restore both engines, the average and the step; another number of processes may have written them.

    Raises:
        UserError: the model differs, or a file contains objects that are not weights.
    """
    manifest = read_manifest("run.resume", path)
    check_weights("run.resume", path / GENERATOR, trainer.generator.module)
    check_weights("run.resume", path / FAKE_SCORE, trainer.guidance.module)
    for name in ENGINES:
        with torch.serialization.safe_globals(saved_types()):
            _load_engine(getattr(trainer, name), path, name, manifest)
    set_rate(trainer.generator, trainer.settings.optim.generator.lr)
    set_rate(trainer.guidance, trainer.settings.optim.fake_score.lr)
    if trainer.guide.state_dict():
        trainer.guide.load_state_dict(_state(path / DISCRIMINATOR))
    average.load(_listed(path, manifest, "average-rank", ".safetensors"))
    for objective in trainer.objectives:
        objective.weight.own, objective.weight.other = manifest["weights"].get(objective.name, (0.0, 0.0))
        if (kept := OBJECTIVE.format(objective.name)) in manifest["files"]:
            objective.load_state_dict(_state(path / kept, trainer.device))
    trainer.step = manifest["step"]


def _state(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    if not file.is_file():
        raise UserError("run.resume", f"{file} is missing; give another checkpoint")
    with naming("run.resume"):
        return load_file(file, device=str(device))


def load_moments(path: Path, trainer: Trainer) -> None:
    """Take the state of both optimizers from a checkpoint of another run; schedules and counters begin anew.

    Raises:
        UserError: a file contains objects that are not weights.
    """
    manifest = read_manifest("run.init_from", path)
    for name in ENGINES:
        engine = getattr(trainer, name)
        own = [
            {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
        ]
        schedule = engine.lr_scheduler.state_dict()
        with torch.serialization.safe_globals(saved_types()):
            _load_engine(engine, path, name, manifest)
        engine.lr_scheduler.load_state_dict(schedule)
        for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
            group.update(settings)
        engine.global_steps = engine.global_samples = engine.micro_steps = engine.skipped_steps = 0


def load_weights(key: str, path: Path, network: nn.Module) -> None:
    """Copy saved weights into the trainable parameters of a network.

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
        UserError: for the first difference.
    """
    try:
        with naming(key), safe_open(path, "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except UserError as error:
        raise UserError(key, f"{path} is damaged ({error.__cause__}); give another checkpoint") from None
    ours = {name: full_shape(p) for name, p in network.named_parameters() if p.requires_grad}
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            raise UserError(
                key,
                f"{path} belongs to another model: {name} has shape {saved.get(name)} there and {ours.get(name)} here; "
                f"give weights of this model",
            )


def set_rate(engine: Any, rate: float) -> None:
    """Set the learning rate; the engine keeps its position in the schedule."""
    schedule = engine.lr_scheduler
    schedule.base_lrs = [rate for _ in schedule.base_lrs]
    for optimizer in (schedule.optimizer, engine.optimizer):
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)


def _load_engine(engine: Any, path: Path, name: str, manifest: dict[str, Any]) -> None:
    """Let DeepSpeed load the files of any number of processes as if the current number had written them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model_states = _listed(path, manifest, f"{name}/", MODEL_FILES)

    def as_ours(file: str, map_location: Any = None) -> Any:
        if not file.endswith(OPTIMIZER_FILES):
            return model_state_for(world, _load_weights_only(file, map_location))
        files = _listed(path, manifest, f"{name}/", OPTIMIZER_FILES)
        states = [optimizer_state(_load_weights_only(str(one), "cpu", mmap=True)) for one in files]
        return optimizer_content(reshard(states, Cuts.of(engine), rank, world))

    same = manifest["world_size"] == world
    read = _load_weights_only if same else as_ours
    load_engine(engine, path, name, read, None if same else model_states[0])


def _load_weights_only(path: str, map_location: Any = None, mmap: bool = False) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        # torch's own text advises weights_only=False.
        raise UserError(
            "run.resume", f"{path} contains objects that are not weights (none was run); resume from another checkpoint"
        ) from None


def _listed(path: Path, manifest: dict[str, Any], start: str, end: str) -> list[Path]:
    """Return the files of a checkpoint that its manifest lists, sorted by the ranks in their names."""
    names = (name for name in manifest["files"] if name.startswith(start) and name.endswith(end))
    return sorted((path / name for name in names), key=_rank)


def _rank(file: Path) -> int:
    """Return the rank in a file's name; as text, rank 10 would come before rank 2."""
    found = re.search(r"rank_?(\d+)", file.name)
    return int(found[1]) if found else 0
