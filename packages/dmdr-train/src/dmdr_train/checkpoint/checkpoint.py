"""Checkpoints: one folder each, whole or not there.

    checkpoints/step-00000150/
        generator/, guidance/     DeepSpeed's state of the two engines
        average-rank0.safetensors the averaged weights; where ZeRO-3 splits them, one file per process
        generator.safetensors     the trained weights of the generator, whole, as they are
        student.safetensors       the same, averaged: what is exported
        fake_score.safetensors    the LoRA of the guidance network
        recipe.yaml
        metrics.jsonl             the rows that could not be written to the run's own, where there are some
        manifest.json             step, world size, what automatic weights follow, versions of packages, fingerprints of
                                  the inputs, size and sha256 of every file, the recipe's among them, and the sha256 of
                                  all this; written last

A run has neither random state nor a place in its data to save: its step is enough. See `dmdr_train.base.random_draws`
and `dmdr_train.data.prompt_order`.
"""

import json
import os
import pickle
import re
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dmdr_train.base.atomic_files import settle, settle_names
from dmdr_train.base.errors import UserError, naming
from dmdr_train.base.versions import versions
from dmdr_train.checkpoint.background_writes import Writes
from dmdr_train.checkpoint.resume import (
    FAKE_SCORE,
    GENERATOR,
    MANIFEST,
    RECIPE,
    STUDENT,
    checkpoints_in,
    read_manifest,
    signed,
)
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.collectives import anywhere
from dmdr_train.distributed.deepspeed_internals import (
    MODEL_FILES,
    OPTIMIZER_FILES,
    full_shape,
    gathered,
    load_engine,
    save_engine,
    saved_types,
)
from dmdr_train.distributed.reshard_zero import Cuts, reshard
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.tracking.trackers import METRICS
from dmdr_train.training.trainer import Trainer

ENGINES = ("generator", "guidance")


class NotSavedError(Exception):
    """A checkpoint that could not be written; the ones before it are as they were."""


class Saving:
    """A checkpoint on its way to the disk, beside the others; every process makes one and every process finishes it.

    Args:
        inputs: `input_fingerprints.fingerprints` of the run, as it began.
        rows: of metrics.jsonl that wait for space, each a line.
        background: copy everything into memory, on the CPU, and let a thread write it; training may go on meanwhile.

    Raises:
        NotSavedError: on every process, if the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        settings: Recipe,
        trainer: Trainer,
        average: Average,
        inputs: Mapping[str, str] | None = None,
        rows: Sequence[str] = (),
        background: bool = False,
    ):
        self.step = trainer.step
        self.final = folder / f"step-{self.step:08d}"
        self.partial = folder / f".{self.final.name}.partial"
        self.writes = Writes(background)
        self.texts = {RECIPE: dump_recipe(settings)}
        if rows:
            self.texts[METRICS] = "".join(f"{row}\n" for row in rows)
        self.manifest = {
            "step": self.step,
            "world_size": trainer.world,
            "weights": {o.name: [o.weight.own, o.weight.other] for o in trainer.objectives},
            "versions": versions(),
            "inputs": dict(inputs or {}),
        }
        if dist.get_rank() == 0:
            self.writes.attempt(self._make_folders)
        self._together()
        self._write(trainer, average)
        if background:
            self.writes.start()

    def finish(self) -> Path:
        """Wait until all is written, and rename the folder into place.

        Raises:
            NotSavedError: on every process, if one of them could not write; what it had written is removed.
        """
        if self.writes.background:
            self.writes.wait()
        self._together()
        ours = {str(path.relative_to(self.partial)): found for path, found in self.writes.fingerprints.items()}
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, ours)
        if dist.get_rank() == 0:
            self.writes.attempt(lambda: self._complete(dict(ChainMap(*everyones))))
        self._together()
        return self.final

    @property
    def written(self) -> bool:
        """Whether this process need not wait to finish it."""
        return self.writes.done

    def _make_folders(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        for name in ENGINES:
            (self.partial / name).mkdir(parents=True)

    def _write(self, trainer: Trainer, average: Average) -> None:
        for name, engine in _engines(trainer).items():
            save_engine(engine, self.partial, name, partial(self.writes, _save_state))
        if average.state and (trainer.rank == 0 or average.split):
            self.writes(save_file, average.state, self.partial / f"average-rank{trainer.rank}.safetensors")
        save_weights(self.partial / GENERATOR, trainer.generator.module, self.writes)
        save_weights(self.partial / FAKE_SCORE, trainer.guidance.module, self.writes)
        with average.applied():
            save_weights(self.partial / STUDENT, trainer.generator.module, self.writes)
        if trainer.rank == 0:
            for name, text in self.texts.items():
                self.writes(_save_text, text, self.partial / name)

    def _complete(self, files: dict[str, Any]) -> None:
        """Write the manifest, and give the folder its name."""
        manifest = signed({**self.manifest, "files": dict(sorted(files.items()))})
        (self.partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        settle(self.partial / MANIFEST)
        for folder in (*(self.partial / name for name in ENGINES), self.partial):
            settle_names(folder)
        if self.final.exists():
            remove(self.final)
        os.replace(self.partial, self.final)
        settle_names(self.final.parent)

    def _together(self) -> None:
        """Go on if every process could write."""
        if not anywhere(self.writes.error is not None):
            return
        if dist.get_rank() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        reason = self.writes.error or "another process could not write"
        raise NotSavedError(f"{self.final} could not be written ({reason}); the checkpoints before it are whole")


def _save_state(state: Any, path: Path) -> None:
    with path.open("wb") as file:  # torch on its own does not say why it could not write
        torch.save(state, file)


def _save_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Take a checkpoint out of sight, then away: half of one never has its name."""
    hidden = path.with_name(f".{path.name}.removed")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """What an earlier process had begun to write or to remove in a run's folder when it was killed."""
    files = ".*.[0-9]*.partial"
    for pattern in ("checkpoints/.step-*", ".*student.partial", files, f"samples/{files}", ".shared-*"):
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
    kept = kept_steps(found, step, last, every, best)
    for number, path in found.items():
        if number not in kept:
            remove(path)


def kept_steps(steps: Iterable[int], step: int, last: int, every: int, best: int | None = None) -> set[int]:
    """The steps whose checkpoints `prune` keeps."""
    past = sorted(number for number in steps if number <= step)
    return {*past[-last:], *(n for n in past if n == best or (every and n % every == 0))}


def save_weights(path: Path, network: nn.Module, write: Callable[..., object] = lambda write, *a: write(*a)) -> None:
    """The trainable parameters of a network, whole and in float32; rank 0 writes."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with gathered(trained.values()):
        if dist.get_rank() == 0:
            whole = {name: p.detach().float().cpu().contiguous() for name, p in trained.items()}
            write(save_file, whole, path)


def save_student(folder: Path, trainer: Trainer, average: Average) -> None:
    """The averaged weights alone, as a file in a new folder, where there is no space for a checkpoint.

    Raises:
        NotSavedError: on every process, if it cannot be written.
    """
    writes = Writes()
    if trainer.rank == 0:
        writes.attempt(folder.mkdir)
    with average.applied():
        save_weights(folder / STUDENT, trainer.generator.module, writes)
    if anywhere(writes.error is not None):
        raise NotSavedError(writes.error or "another process could not write")


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
    ours = {name: full_shape(p) for name, p in network.named_parameters() if p.requires_grad}
    for name in sorted(saved.keys() | ours.keys()):
        if saved.get(name) != ours.get(name):
            raise UserError(
                key,
                f"{path} is of another model: {name} has shape {saved.get(name)} there and {ours.get(name)} here; "
                f"give one of this model",
            )


def load(path: Path, trainer: Trainer, average: Average) -> None:
    """Restore both engines, the average and the step, whatever the number of processes that wrote them.

    Raises:
        UserError: the model differs, or a file holds more than weights.
    """
    manifest = read_manifest("run.resume", path)
    check_weights("run.resume", path / GENERATOR, trainer.generator.module)
    check_weights("run.resume", path / FAKE_SCORE, trainer.guidance.module)
    for name, engine in _engines(trainer).items():
        with torch.serialization.safe_globals(saved_types()):
            _load_engine(engine, path, name, manifest)
    set_rate(trainer.generator, trainer.settings.optim.generator.lr)
    set_rate(trainer.guidance, trainer.settings.optim.fake_score.lr)
    average.load(_listed(path, manifest, "average-rank", ".safetensors"))
    for objective in trainer.objectives:
        objective.weight.own, objective.weight.other = manifest["weights"].get(objective.name, (0.0, 0.0))
    trainer.step = manifest["step"]


def _load_engine(engine: Any, path: Path, name: str, manifest: dict[str, Any]) -> None:
    """Have DeepSpeed load what any number of processes have written as if this number had."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model_states = _listed(path, manifest, f"{name}/", MODEL_FILES)

    def as_ours(file: str, map_location: Any = None) -> Any:
        if not file.endswith(OPTIMIZER_FILES):
            return {**_load_weights_only(file, map_location), "dp_world_size": world}
        files = _listed(path, manifest, f"{name}/", OPTIMIZER_FILES)
        states = [_load_weights_only(str(one), "cpu", mmap=True)["optimizer_state_dict"] for one in files]
        return {"optimizer_state_dict": reshard(states, Cuts.of(engine), rank, world)}

    same = manifest["world_size"] == world
    read = _load_weights_only if same else as_ours
    load_engine(engine, path, name, read, None if same else model_states[0])


def set_rate(engine: Any, rate: float) -> None:
    """Go on with this learning rate, at the point of its schedule that the engine is at."""
    schedule = engine.lr_scheduler
    schedule.base_lrs = [rate for _ in schedule.base_lrs]
    for optimizer in (schedule.optimizer, engine.optimizer):
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor(schedule.last_epoch)


def _listed(path: Path, manifest: dict[str, Any], start: str, end: str) -> list[Path]:
    """Files of a checkpoint by the ranks in their names: those that its manifest knows, and no others."""
    names = (name for name in manifest["files"] if name.startswith(start) and name.endswith(end))
    return sorted((path / name for name in names), key=_rank)


def _rank(file: Path) -> int:
    """The rank in a file's name, by which names do not sort."""
    found = re.search(r"rank_?(\d+)", file.name)
    return int(found[1]) if found else 0


def _engines(trainer: Trainer) -> dict[str, Any]:
    return {name: getattr(trainer, name) for name in ENGINES}


def _load_weights_only(path: str, map_location: Any = None, mmap: bool = False) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        # torch's own text advises weights_only=False.
        raise UserError(
            "run.resume", f"{path} holds more than weights, none of which was run; resume from another checkpoint"
        ) from None
