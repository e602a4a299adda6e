"""Checkpoints: one folder each, whole or not there.

    checkpoints/step-00000150/
        generator/, guidance/     DeepSpeed's state of the two engines
        average-rank0.safetensors the averaged weights, one file per process
        generator.safetensors     the trained weights of the generator, whole, as they are
        student.safetensors       the same, averaged: what is exported
        fake_score.safetensors    the LoRA of the guidance network
        recipe.yaml
        manifest.json             step, world size, what automatic weights follow, and size and sha256 of every file;
                                  written last

A run has neither random state nor a place in its data to save (see `dmdr_train.draws` and `.prompts`): its step is
enough.
"""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dmdr_train.average import Average
from dmdr_train.engines import gathered
from dmdr_train.errors import UserError, naming
from dmdr_train.files import fingerprint
from dmdr_train.recipe import Recipe
from dmdr_train.recipe_file import dump_recipe
from dmdr_train.trainer import Trainer

MANIFEST = "manifest.json"
GENERATOR, STUDENT, FAKE_SCORE = "generator.safetensors", "student.safetensors", "fake_score.safetensors"
# What a resumed run may change: these keys, and everything below them.
FREE_KEYS = (
    "run", "tracking", "watch", "memory", "optim.generator.lr", "optim.fake_score.lr", "model.path", "model.vae",
    "data.embeddings",
)  # fmt: skip
FIXED_KEYS = (
    "run.seed", "memory.reward_crop", "memory.reward_scale", "memory.shared_backbone", "memory.offload_optimizer",
)  # fmt: skip


def checkpoints_in(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def find_checkpoint(settings: Recipe) -> Path | None:
    """The checkpoint that `run.resume` asks for; None to start afresh.

    Raises:
        UserError: a given path holds no checkpoint, or one of a run that this recipe cannot go on with.
    """
    choice = settings.run.resume
    if choice == "never":
        return None
    if choice == "auto":
        found = checkpoints_in(Path(settings.run.output) / "checkpoints")
        path = found[-1] if found else None
    else:
        path = newest("run.resume", choice)
    if path is not None:
        verify("run.resume", path)
        refuse_difference(settings, path)
    return path


def newest(key: str, text: str) -> Path:
    """The checkpoint at a path: itself, or the newest in a folder of checkpoints or in a run's folder."""
    folder = Path(text)
    for candidate in (folder, *reversed(checkpoints_in(folder)), *reversed(checkpoints_in(folder / "checkpoints"))):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise UserError(key, f"{text} holds no checkpoint; give one of step-*, or start without it")


def refuse_difference(settings: Recipe, path: Path) -> None:
    """Refuse to go on with a checkpoint of another recipe, except where a change is harmless."""
    saved = _flat(yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8")))
    asked = _flat(settings.model_dump(mode="json"))
    for key in sorted(saved.keys() | asked.keys()):
        free = any(key == k or key.startswith(f"{k}.") for k in FREE_KEYS) and key not in FIXED_KEYS
        if not free and saved.get(key) != asked.get(key):
            raise UserError(
                key,
                f"is {asked.get(key)} here and {saved.get(key)} in {path}; "
                f"set it back, or start a new run with another run.output",
            )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    else:
        return {prefix: node}
    return {k: v for name, child in items for k, v in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()}


def save(folder: Path, settings: Recipe, trainer: Trainer, average: Average) -> Path:
    """Write a checkpoint beside the others and rename it into place when it is whole; every process calls this."""
    final = folder / f"step-{trainer.step:08d}"
    partial = folder / f".{final.name}.partial"
    if trainer.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    for name, engine in _engines(trainer).items():
        engine.save_checkpoint(str(partial), tag=name, save_latest=False, exclude_frozen_parameters=True)
    if average.state:
        save_file(average.state, partial / f"average-rank{trainer.rank}.safetensors")
    save_weights(partial / GENERATOR, trainer.generator.module)
    save_weights(partial / FAKE_SCORE, trainer.guidance.module)
    with average.applied():
        save_weights(partial / STUDENT, trainer.generator.module)
    dist.barrier()
    if trainer.rank == 0:
        for script in partial.glob("*.py"):
            script.unlink()
        (partial / "recipe.yaml").write_text(dump_recipe(settings), encoding="utf-8")
        files = {str(p.relative_to(partial)): fingerprint(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        manifest = {
            "step": trainer.step,
            "world_size": trainer.world,
            "weights": {o.name: [o.weight.own, o.weight.other] for o in trainer.objectives},
            "files": files,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in checkpoints_in(folder)[: -settings.run.keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def save_weights(path: Path, network: nn.Module) -> None:
    """The trainable parameters of a network, whole and in float32; rank 0 writes."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with gathered(trained.values()):
        if dist.get_rank() == 0:
            save_file({name: p.detach().float().cpu().contiguous() for name, p in trained.items()}, path)


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
    with naming(key), safe_open(path, "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
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


def read_manifest(key: str, path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(key, f"{path / MANIFEST} is damaged; give another checkpoint") from None


def verify(key: str, path: Path) -> None:
    """Check that every file of a checkpoint is as its manifest says.

    Raises:
        UserError: names the first file that is missing or differs.
    """
    for name, expected in read_manifest(key, path)["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(key, f"{file} is missing; give another checkpoint")
        if fingerprint(file) != expected:
            raise UserError(key, f"{file} is damaged; give another checkpoint")


def _engines(trainer: Trainer) -> dict[str, Any]:
    return {"generator": trainer.generator, "guidance": trainer.guidance}


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
