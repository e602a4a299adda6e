"""A run from start to end: train, log, sample, checkpoint, evaluate, report."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.base.errors import StoppedError, naming
from dmdr_train.base.exit_codes import NOT_SAVED
from dmdr_train.checkpoint.background_writes import reason_of
from dmdr_train.checkpoint.find import checkpoints_in, find_checkpoint, step_of
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.checkpoint.load import load_checkpoint
from dmdr_train.checkpoint.manifest import RECIPE
from dmdr_train.checkpoint.retention import remove_leftovers
from dmdr_train.data.cut_prompts import recipe_cuts
from dmdr_train.data.prompt_order import StreamedPrompts, TextPrompts
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.collectives import agreed, mean_over_processes
from dmdr_train.distributed.device import choose_device
from dmdr_train.distributed.lost_process import Peers
from dmdr_train.distributed.process_group import processes
from dmdr_train.distributed.run_lock import LOCK, hold, sign
from dmdr_train.distributed.shared_folder import check_shared
from dmdr_train.distributed.signals import Signals
from dmdr_train.monitoring import rules
from dmdr_train.monitoring.measures import Look, Watch, compared, pooled_pixels
from dmdr_train.monitoring.step_costs import StepCosts
from dmdr_train.planning.at_start import automatic_checkpointing, plan_lines
from dmdr_train.planning.checkpointing import with_checkpointing
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run.build import build
from dmdr_train.run.disk_space import space
from dmdr_train.run.header import header
from dmdr_train.run.milestones import Results, due
from dmdr_train.run.saving import Checkpoints, best_step
from dmdr_train.run.stopping import Stopping
from dmdr_train.tracking.metrics_file import METRICS
from dmdr_train.tracking.run_tracker import RunTracker, open_tracker
from dmdr_train.tracking.tracker import Tracker
from dmdr_train.training.trainer import Trainer


def run(settings: Recipe, callbacks: Sequence[Tracker] = ()) -> None:
    """Carry out a recipe that `preflight.check` has passed; every process calls this.

    Args:
        callbacks: receive what the run logs, beside the recipe's trackers, on the first process.

    Raises:
        UserError: on every process.
        StoppedError: on every process that is left, for a run that ends early in good order.
    """
    device = choose_device(settings.run, settings.optim.precision, settings.optim.eight_bit)
    with processes(device, settings.run.timeout):
        settings = with_automatic(settings, device)
        peers = Peers()
        # Signals before the rest: a launcher sends them as soon as a process is lost, before the others have named it.
        with Signals() as signals, peers.expected():
            check_shared(Path(settings.run.output), peers)
            with locked(Path(settings.run.output)) as held:
                resume_from = agreed(lambda: find_checkpoint(settings, say))
                trainer = build(settings, device, resumed=resume_from is not None)
                training = Run(settings, trainer, resume_from, signals, callbacks)
                agreed(lambda: say(space(settings, trainer).check()))
                agreed(lambda: say_cuts(settings, trainer))
                agreed(lambda: print_header(settings, trainer))
                for lock in held:
                    sign(lock)  # not before: a run that is refused leaves everything as it was
                training.carry_out()


def dry_run(settings: Recipe) -> dict[str, float]:
    """Build everything and take the first step of every stage, at the largest size; nothing is written."""
    device = choose_device(settings.run, settings.optim.precision, settings.optim.eight_bit)
    logs: dict[str, float] = {}
    with processes(device, settings.run.timeout), Peers().expected():
        settings = with_automatic(settings, device)
        trainer = build(settings, device)
        trainer.rollouts.sizes = [max(trainer.rollouts.sizes, key=lambda size: size.height * size.width)]
        agreed(lambda: say(str(space(settings, trainer))))
        agreed(lambda: say_cuts(settings, trainer))
        for trainer.step in sorted({objective.start for objective in settings.objectives}):
            logs |= mean_over_processes(trainer.train_step())
    return logs


class Run:
    """The outer loop. Only rank 0 writes; whatever calls a network is called by every process."""

    def __init__(
        self,
        settings: Recipe,
        trainer: Trainer,
        resume_from: Path | None,
        signals: Signals | None = None,
        callbacks: Sequence[Tracker] = (),
    ) -> None:
        self.settings = settings
        self.trainer = trainer
        self.callbacks = callbacks
        self.folder = Path(settings.run.output)
        inputs = agreed(lambda: fingerprints(settings))
        self.average = Average(self.trainer.generator, settings.optim.ema)
        if resume_from is not None:
            load_checkpoint(resume_from, self.trainer, self.average)
        self.tracker: RunTracker | None = None
        self.results = Results(
            settings, trainer, self.average, resume_from, interrupted=lambda: self.stopping.heed_signals()
        )
        self.before = rules.logged_before(resume_from, self.trainer.step) if resume_from is not None else []
        self.history = rules.remembered(self.before)
        self.teachers_look: Look | None = None
        self.watch: Watch | None = None
        if settings.watch.every:
            evaluator = self.results.evaluator
            features = evaluator.classifier.features if evaluator and evaluator.classifier else pooled_pixels
            self.watch = Watch(settings, self.trainer, features, self.results.batch)
            agreed(self.watch.check)
        self.checkpoints = Checkpoints(
            settings, self.trainer, self.average, self.results, inputs, resume_from, self.best_step
        )
        self.stopping = Stopping(
            settings, self.trainer, self.results, self.checkpoints, self.watch, signals or Signals()
        )

    def carry_out(self) -> None:
        """Sample the teacher if this is the start, train, and report.

        Raises:
            StoppedError: the run ends early, in good order; see docs/reliability.md.
        """
        agreed(self.open_folder)
        together = True
        try:
            self.results.begin()
            self.train()
            self.finish()
        except BaseException as error:
            together = isinstance(error, StoppedError)
            raise
        finally:
            if self.tracker:
                self.tracker.close()
            if together:
                dist.barrier()  # a launcher ends the others soon after the first has ended

    def open_folder(self) -> None:
        """Clear away what an earlier process left half done, and begin to write.

        Raises:
            StoppedError: that cannot be, such as on a full disk.
        """
        text = dump_recipe(self.settings)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            write_whole(self.folder / RECIPE, lambda path: path.write_text(text, encoding="utf-8"))
            self.tracker = self.results.tracker = open_tracker(
                self.folder, self.settings, self.trainer.step, self.before, self.callbacks
            )
        except OSError as error:
            reason = f"{self.folder} cannot be written to ({reason_of(error)})"
            raise StoppedError(NOT_SAVED, f"{reason}; make space, or give another run.output") from None
        later = [path for path in checkpoints_in(self.folder / "checkpoints") if step_of(path) > self.trainer.step]
        if later:
            names = ", ".join(path.name for path in later)
            self.results.say(f"warning: {names}: these steps are made again, and go when the next checkpoint is there")
        if self.trainer.step >= self.settings.tracking.log_every and not self.before:
            self.results.say(f"warning: no {METRICS} has the steps before; curves and early warning begin here")

    def train(self) -> None:
        """Step until `run.steps`; log, save, sample and evaluate on the way."""
        steps = self.settings.run.steps
        ends = {end: stage for stage, end in self.settings.stages.items()}
        seconds, since, in_a_row = 0.0, self.trainer.step, 0
        costs = StepCosts(self.trainer.device)
        self.results.show()  # what the run before may not have come to
        while self.trainer.step < steps:
            if self.trainer.step in ends:
                self.results.end_stage(ends[self.trainer.step])
            started = time.perf_counter()
            skipped = self.skipped
            logs = self.trainer.train_step()
            in_a_row = in_a_row + 1 if self.skipped > skipped else 0
            step = self.trainer.step
            self.average.update(step)
            took = time.perf_counter() - started
            seconds += took
            costs.add(took)
            if costs.line():
                self.results.say(costs.line())
            if self.tracker:
                self.tracker.advance()
            looked = self.look() if due(step, self.settings.watch.every) else {}
            if self.settings.logged(step):
                times = {"train_seconds": seconds, "seconds_per_step": seconds / (step - since), **costs.values()}
                self.log(step, {**logs, **self._engine_values(), **times, **looked})
            self.checkpoints.finish_if_written()
            ending = self.stopping.ending(in_a_row, self.history if looked else None)
            if ending or step == steps or due(step, self.settings.run.checkpoint_every):
                self.checkpoints.save(needed=ending is not None or step == steps)
            if ending:
                self.stopping.stop(*ending)
            self.results.show()

    def finish(self) -> None:
        """Score the student beside its references, export it, and write the report.

        The training is saved; a signal ends this between two of its parts.
        """
        self.results.end_stage(list(self.settings.stages)[-1])
        self.results.evaluate_references()
        if failure := self.stopping.failure():
            self.results.say(f"warning: {failure}; its scores are not in the report")
        assert self.checkpoints.newest
        self.results.report(self.checkpoints.newest)

    def best_step(self) -> int | None:
        """The step to keep by `run.keep_best`."""
        return best_step(self.settings.run.keep_best, self.results.scores, self.history)

    # -- what is logged

    @property
    def skipped(self) -> int:
        """The updates so far that the engines skipped, since losses or gradients were not finite."""
        return int(self.trainer.generator.skipped_steps + self.trainer.guidance.skipped_steps)

    def log(self, step: int, values: dict[str, float]) -> None:
        values = mean_over_processes(values)
        if self.tracker:
            matching = next(iter(self.settings.needing("fake_score")), "")
            values = rules.completed({**values, "checkpoint_seconds": self.checkpoints.pause}, self.history, matching)
            self.history = rules.remembered([*self.history, {"step": step, **values}])
            self.tracker.log(step, values)
        self.checkpoints.pause = 0.0

    def look(self) -> dict[str, float]:
        """What early warning sees of the averaged student, beside the teacher, which it looks at once."""
        assert self.watch is not None
        started = time.perf_counter()
        if self.teachers_look is None:
            self.teachers_look = self.watch.look(*self.results.teacher())
        with self.average.applied():
            student = self.watch.look(*self.results.student())
        return {**compared(student, self.teachers_look), "watch_seconds": time.perf_counter() - started}

    def _engine_values(self) -> dict[str, float]:
        values = {}
        for name, engine in (("generator", self.trainer.generator), ("fake_score", self.trainer.guidance)):
            values[f"skipped/{name}"] = float(engine.skipped_steps)
            if self.settings.optim.precision == "fp16":
                values[f"loss_scale/{name}"] = float(engine.optimizer.loss_scale)
            values[f"lr/{name}"] = float(engine.get_lr()[0])
            norm = engine.get_global_grad_norm()
            if norm is not None:
                values[f"grad_norm/{name}"] = float(norm)
        return values


@contextmanager
def locked(folder: Path) -> Iterator[list[IO[str]]]:
    """The run's folder, made and held by rank 0 for as long as this is open.

    Yields:
        On rank 0 its lock, still to be signed; elsewhere nothing.

    Raises:
        UserError: on every process, if another run holds it, or it cannot be made.
    """
    held: list[IO[str]] = []
    made = [path for path in (folder, *folder.parents) if not path.exists()]

    def take() -> None:
        with naming("run.output"):
            folder.mkdir(parents=True, exist_ok=True)
            held.append(hold(folder))

    agreed(take)
    try:
        yield held
    finally:
        for file in held:
            with suppress(FileNotFoundError):
                if not (folder / LOCK).stat().st_size:  # nothing came of it
                    (folder / LOCK).unlink()
            file.close()
        with suppress(OSError):  # unless something did
            for path in made:
                path.rmdir()


def say_cuts(settings: Recipe, trainer: Trainer) -> None:
    """Warn of prompts that are longer than what the text encoders read."""
    prompts = trainer.rollouts.prompts
    if isinstance(prompts, TextPrompts | StreamedPrompts):
        for line in recipe_cuts(settings, trainer.family, prompts.texts):
            say(line)


def with_automatic(settings: Recipe, device: torch.device) -> Recipe:
    """The recipe with what is chosen on this device, the same on all processes; it is what the run's folder keeps."""
    if settings.memory.gradient_checkpointing != "auto":
        return settings

    def decide() -> list[str]:
        parts, line = automatic_checkpointing(settings, device, dist.get_world_size())
        say(line)
        return parts

    return with_checkpointing(settings, agreed(decide))


def print_header(settings: Recipe, trainer: Trainer) -> None:
    """Print what the run is and, on a GPU, what it will cost."""
    print(header(settings, trainer, plan_lines(settings, trainer.device, trainer.world)), flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
