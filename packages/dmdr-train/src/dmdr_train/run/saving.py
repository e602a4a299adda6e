"""The checkpoints of a run: when they are written, what happens if they cannot be, and which is the best."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dmdr_train.base.errors import StoppedError
from dmdr_train.base.exit_codes import NOT_SAVED
from dmdr_train.checkpoint.background_writes import reason_of
from dmdr_train.checkpoint.retention import prune
from dmdr_train.checkpoint.save import NotSavedError, Saving
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.collectives import anywhere
from dmdr_train.evaluation.scores import Scores
from dmdr_train.monitoring import rules
from dmdr_train.recipe.schema import EVALUATED, Recipe
from dmdr_train.run.milestones import Results
from dmdr_train.training.trainer import Trainer


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, and removes those that are not to be kept.

    Args:
        inputs: `input_fingerprints.fingerprints` of the run, as it began.
        newest: the checkpoint that the run goes on from.
        best: returns the step to keep by `run.keep_best`.

    Attributes:
        newest: the last that is whole, and `step` its step.
        pause: seconds that training has stood still for them.
    """

    def __init__(
        self,
        settings: Recipe,
        trainer: Trainer,
        average: Average,
        results: Results,
        inputs: Mapping[str, str],
        newest: Path | None,
        best: Callable[[], int | None],
    ) -> None:
        self.settings = settings
        self.trainer = trainer
        self.average = average
        self.results = results
        self.inputs = inputs
        self.best = best
        self.folder = Path(settings.run.output) / "checkpoints"
        self.newest, self.step = newest, None if newest is None else trainer.step
        self.saving: Saving | None = None
        self.pause = 0.0

    def save(self, needed: bool = False) -> None:
        """Write a checkpoint, in the background if the recipe says so.

        Args:
            needed: the run ends with it; it is written when this returns.

        Raises:
            StoppedError: it could not be written and was needed, or the recipe says to stop.
        """
        self.finish()
        tracker = self.results.tracker
        if tracker:
            tracker.rows.settle()
        rows = tracker.rows.waiting if tracker else []
        background = self.settings.run.save_in_background and not needed
        with self.pausing(needed):
            self.saving = Saving(self.folder, self.settings, self.trainer, self.average, self.inputs, rows, background)
        if not background:
            self.finish(needed)

    def finish(self, needed: bool = False) -> None:
        """Wait for the checkpoint that is being written, if there is one, and remove those that are not to be kept.

        Raises:
            StoppedError: as `save` does.
        """
        if self.saving is None:
            return
        run, saving, self.saving = self.settings.run, self.saving, None
        with self.pausing(needed):
            self.newest, self.step = saving.finish(), saving.step
            if self.trainer.rank == 0:
                if self.results.tracker:
                    self.results.tracker.checkpoint(self.step, self.newest)
                try:
                    prune(self.folder, saving.step, run.keep_last, run.keep_every, self.best())
                except OSError as error:
                    self.results.say(f"warning: an old checkpoint could not be removed ({reason_of(error)})")

    def finish_if_written(self) -> None:
        """Finish the checkpoint that is being written if no process need wait for it."""
        if self.saving and not anywhere(not self.saving.written):
            self.finish()

    @contextmanager
    def pausing(self, needed: bool) -> Iterator[None]:
        """Count the time that training stands still, and do what the recipe says where a checkpoint is not saved."""
        started = time.perf_counter()
        try:
            yield
        except NotSavedError as error:
            if needed or self.settings.run.on_failed_save == "stop":
                rescued = self.results.rescue() if self.trainer.step == self.settings.run.steps else ""
                raise StoppedError(NOT_SAVED, f"{error}{rescued}") from None
            self.results.say(f"warning: {error}; the run goes on")
        finally:
            self.pause += time.perf_counter() - started


def best_step(name: str | None, scores: Mapping[str, Scores], history: Sequence[rules.Row]) -> int | None:
    """The step that is best by `run.keep_best`: the lowest Fréchet distance, the highest of others."""
    if name is None:
        return None
    if name in EVALUATED:
        taken = {key: row for key, row in scores.items() if key.startswith("step-")}
        found = {int(key.removeprefix("step-")): getattr(row, name) for key, row in taken.items()}
    else:
        found = {int(row["step"]): row[name] for row in rules.evaluations(history) if name in row}
    sign = -1 if name.startswith("frechet") else 1
    return max((step for step in found if not math.isnan(found[step])), key=lambda s: sign * found[s], default=None)
