"""Save a checkpoint, at once or in the background, or weights alone."""

import json
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from dmdr_train.base.atomic_files import settle, settle_names
from dmdr_train.base.errors import DmdrTrainError
from dmdr_train.base.versions import versions
from dmdr_train.checkpoint.background_writes import Writes
from dmdr_train.checkpoint.manifest import (
    DISCRIMINATOR,
    ENGINES,
    FAKE_SCORE,
    GENERATOR,
    MANIFEST,
    OBJECTIVE,
    RECIPE,
    STUDENT,
    signed,
)
from dmdr_train.checkpoint.retention import remove
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.collectives import anywhere
from dmdr_train.distributed.deepspeed_internals import save_engine
from dmdr_train.distributed.master_weights import Share, masters
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.tracking.metrics_file import METRICS
from dmdr_train.training.trainer import Trainer


class NotSavedError(DmdrTrainError):
    """Raised if a checkpoint could not be written; earlier checkpoints are unchanged."""


class Saving:
    """A checkpoint that is being written beside the others. Every process creates this object and calls `finish`.

    Args:
        inputs: `input_fingerprints.fingerprints` at the start of the run.
        rows: waiting rows of metrics.jsonl, one line each, that could not be written yet.
        background: copy everything into the CPU's memory and let a thread write it, so that training can continue.

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
        """Wait until everything is written, and rename the folder to its final name.

        Raises:
            NotSavedError: on every process, if one of them could not write; the incomplete folder is removed.
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
        """Whether `finish` would not have to wait for the writes of this process."""
        return self.writes.done

    def _make_folders(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        for name in ENGINES:
            (self.partial / name).mkdir(parents=True)

    def _write(self, trainer: Trainer, average: Average) -> None:
        for name in ENGINES:
            save_engine(getattr(trainer, name), self.partial, name, partial(self.writes, _save_state))
        if average.state and (trainer.rank == 0 or average.split):
            self.writes(save_file, average.state, self.partial / f"average-rank{trainer.rank}.safetensors")
        save_weights(self.partial / GENERATOR, masters(trainer.generator), self.writes)
        save_weights(self.partial / FAKE_SCORE, masters(trainer.guidance), self.writes)
        save_weights(self.partial / STUDENT, average.shares(), self.writes)
        if trainer.rank == 0:
            kept = {DISCRIMINATOR: trainer.guide.state_dict()}
            kept |= {OBJECTIVE.format(o.name): o.state_dict() for o in trainer.objectives}
            for name, state in kept.items():
                if state:
                    self.writes(save_file, state, self.partial / name)
            for name, text in self.texts.items():
                self.writes(_save_text, text, self.partial / name)

    def _complete(self, files: dict[str, Any]) -> None:
        """Write the manifest, and rename the folder to its final name."""
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
        """Raise NotSavedError on every process if one of them could not write."""
        if not anywhere(self.writes.error is not None):
            return
        if dist.get_rank() == 0:
            shutil.rmtree(self.partial, ignore_errors=True)
        reason = self.writes.error or "another process could not write"
        raise NotSavedError(f"{self.final} could not be written ({reason}); the checkpoints before it are whole")


def save_student(folder: Path, trainer: Trainer, average: Average) -> None:
    """Save the averaged weights alone, as a file in a new folder; for when there is no space for a checkpoint.

    Raises:
        NotSavedError: on every process, if it cannot be written.
    """
    writes = Writes()
    if trainer.rank == 0:
        writes.attempt(folder.mkdir)
    save_weights(folder / STUDENT, average.shares(), writes)
    if anywhere(writes.error is not None):
        raise NotSavedError(writes.error or "another process could not write")


def save_weights(
    path: Path, shares: Mapping[str, Share], write: Callable[..., object] = lambda write, *a: write(*a)
) -> None:
    """Save weights, complete and in float32, of which every process holds shares; rank 0 writes."""
    complete = {}
    for name, share in shares.items():
        tensor = share.whole()
        if dist.get_rank() == 0:
            complete[name] = tensor.cpu()
    if dist.get_rank() == 0:
        write(save_file, complete, path)


def _save_state(state: Any, path: Path) -> None:
    with path.open("wb") as file:  # with a path, torch does not tell the reason of a failure
        torch.save(state, file)


def _save_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
