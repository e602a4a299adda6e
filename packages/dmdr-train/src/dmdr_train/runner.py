"""A run from start to end: train, log, sample, checkpoint, evaluate, report."""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from dmdr_models.images import save_png
from PIL import Image
from safetensors import SafetensorError

from dmdr_train import checkpoint, report, rules
from dmdr_train.average import Average
from dmdr_train.engines import agreed, anywhere, choose_device, mean_over_processes, start_processes
from dmdr_train.errors import EARLY_WARNING, NOT_FINITE, NOT_SAVED, STOPPED, StoppedError, UserError, naming
from dmdr_train.evaluation import Evaluator, Scores, read_scores, save_scores
from dmdr_train.export import export_student, sampling_settings
from dmdr_train.files import write_whole
from dmdr_train.lock import hold
from dmdr_train.peers import Peers
from dmdr_train.pictures import draw_samples, labelled_rows, sample_row, save_row
from dmdr_train.preflight import RUN_FILE
from dmdr_train.recipe import Recipe
from dmdr_train.recipe_file import dump_recipe
from dmdr_train.resume import checkpoints_in, find_checkpoint
from dmdr_train.session import Session, build
from dmdr_train.shared import check_shared
from dmdr_train.signals import Signals
from dmdr_train.tracking import Tracker
from dmdr_train.trainer import Teacher
from dmdr_train.watch import Look, Watch, compared, pooled_pixels
from dmdr_train.writes import Unhurried, reason_of


def run(settings: Recipe) -> None:
    """Carry out a recipe that `preflight.check` has passed; every process calls this.

    Raises:
        UserError: on every process.
        StoppedError: on every process that is left, for a run that ends early in good order.
    """
    device = choose_device(settings.run, settings.optim.precision, settings.optim.eight_bit)
    start_processes(device, settings.run.timeout)
    peers = Peers()
    # Signals outermost: a launcher sends them as soon as a process is lost, before the others have named it.
    with Signals() as signals, peers.expected():
        check_shared(Path(settings.run.output), peers)
        resume_from = agreed(lambda: find_checkpoint(settings, say))
        Run(settings, build(settings, device), resume_from, signals).carry_out()
    dist.destroy_process_group()


def dry_run(settings: Recipe) -> dict[str, float]:
    """Build everything and take the first step of every stage; nothing is written."""
    device = choose_device(settings.run, settings.optim.precision, settings.optim.eight_bit)
    start_processes(device, settings.run.timeout)
    logs: dict[str, float] = {}
    with Peers().expected():
        session = build(settings, device)
        for session.trainer.step in sorted({objective.start for objective in settings.objectives}):
            logs |= mean_over_processes(session.trainer.train_step())
    dist.destroy_process_group()
    return logs


class Run:
    """The outer loop. Only rank 0 writes; whatever calls a network is called by every process."""

    def __init__(
        self, settings: Recipe, session: Session, resume_from: Path | None, signals: Signals | None = None
    ) -> None:
        self.settings = settings
        self.session = session
        self.trainer = session.trainer
        self.teacher = Teacher(self.trainer.guidance)
        self.folder = Path(settings.run.output)
        self.average = Average(self.trainer.generator.module, settings.optim.ema)
        if resume_from is not None:
            checkpoint.load(resume_from, self.trainer, self.average)
        self.scores: dict[str, Scores] = {}
        if resume_from is not None:
            self.scores = {key: row for key, row in read_scores(self.folder).items() if self.still_true(key)}
        self.first = self.trainer.rank == 0
        self.tracker: Tracker | None = None
        self.signals = signals or Signals()
        self.unhurried = Unhurried(self.say)
        self.saving: checkpoint.Saving | None = None
        self.pause = 0.0
        self._evaluator: Evaluator | None = None
        if settings.tracking.evaluation:
            with naming("tracking.evaluation"):
                assert self.evaluator  # a mistake in it is better known before the training than after
        self.history = rules.logged_before(resume_from, self.trainer.step) if resume_from is not None else []
        self.teachers_look: Look | None = None
        self.watch: Watch | None = None
        if settings.watch.every:
            features = self.evaluator.classifier.features if settings.tracking.evaluation else pooled_pixels
            self.watch = Watch(settings, session, features, self._batch())

    def still_true(self, key: str) -> bool:
        """Whether a score of an earlier session was taken at a step that this one starts at or after."""
        taken = int(key.removeprefix("step-")) if key.startswith("step-") else self.settings.stages.get(key, 0)
        return taken <= self.trainer.step

    def carry_out(self) -> None:
        """Sample the teacher if this is the start, train, and report; the folder is held meanwhile.

        Raises:
            UserError: another run holds the folder.
            StoppedError: the run ends early, in good order; see docs/reliability.md.
        """
        with locked(self.folder):
            agreed(self.open_folder)
            try:
                if self.trainer.step == 0:
                    self.sample_teacher()
                self.train()
                self.finish()
            finally:
                if self.tracker:
                    self.tracker.close()

    def open_folder(self) -> None:
        """Clear away what an earlier process left half done, and begin to write.

        Raises:
            UserError: that cannot be, such as on a full disk.
        """
        checkpoint.remove_leftovers(self.folder)
        text = dump_recipe(self.settings)
        try:
            write_whole(self.folder / RUN_FILE, lambda path: path.write_text(text, encoding="utf-8"))
            self.tracker = Tracker(self.folder, self.settings, self.trainer.step)
        except OSError as error:
            reason = f"{self.folder} cannot be written to ({reason_of(error)})"
            raise UserError("run.output", f"{reason}; make space, or give another folder") from None

    def train(self) -> None:
        """Step until `run.steps`; log, save, sample and evaluate on the way."""
        tracking, steps = self.settings.tracking, self.settings.run.steps
        ends = {end: stage for stage, end in self.settings.stages.items()}
        seconds, since, in_a_row = 0.0, self.trainer.step, 0
        self.show()  # what the run before may not have come to
        while self.trainer.step < steps:
            if self.trainer.step in ends:
                self.end_stage(ends[self.trainer.step])
            started = time.perf_counter()
            skipped = self.skipped
            logs = self.trainer.train_step()
            in_a_row = in_a_row + 1 if self.skipped > skipped else 0
            self.average.update()
            seconds += time.perf_counter() - started
            step = self.trainer.step
            if self.tracker:
                self.tracker.advance()
            looked = self.look() if _due(step, self.settings.watch.every) else {}
            if step % tracking.log_every == 0 or looked or step == steps:
                times = {"train_seconds": seconds, "seconds_per_step": seconds / (step - since)}
                times |= {"checkpoint_seconds": self.pause}
                self.log(step, {**logs, **self._engine_values(), **times, **looked})
                self.pause = 0.0
            if in_a_row == self.settings.run.max_skipped:
                self.save(needed=True)
                raise StoppedError(NOT_FINITE, self.diagnosis(in_a_row))
            if self.saving and not anywhere(not self.saving.written):
                self.finish_saving()
            alarm = self.judge() if looked else None
            asked = self.asked_to_stop()
            if asked or alarm or _due(step, self.settings.run.checkpoint_every) or step == steps:
                self.save(needed=asked or alarm is not None or step == steps)
            if alarm:
                self.stop(alarm)
            if asked:
                self.leave()
            self.show()

    # -- checkpoints

    def save(self, needed: bool = False) -> None:
        """Write a checkpoint, in the background if the recipe says so.

        Args:
            needed: the run ends with it; it is written when this returns.

        Raises:
            StoppedError: it could not be written and was needed, or the recipe says to stop.
        """
        self.finish_saving()
        background = self.settings.run.save_in_background and not needed
        with self.pausing(needed):
            folder = self.folder / "checkpoints"
            self.saving = checkpoint.Saving(folder, self.settings, self.trainer, self.average, background)
        if not background:
            self.finish_saving(needed)

    def finish_saving(self, needed: bool = False) -> None:
        """Wait for the checkpoint that is being written, if there is one, and remove those that are not to be kept.

        Raises:
            StoppedError: as `save` does.
        """
        if self.saving is None:
            return
        run, saving, self.saving = self.settings.run, self.saving, None
        with self.pausing(needed):
            saving.finish()
            if self.first:
                folder = self.folder / "checkpoints"
                checkpoint.prune(folder, saving.step, run.keep_last, run.keep_every, self.best_step())

    @contextmanager
    def pausing(self, needed: bool) -> Iterator[None]:
        """Count the time that training stands still, and do what the recipe says where a checkpoint is not saved."""
        started = time.perf_counter()
        try:
            yield
        except checkpoint.NotSavedError as error:
            if needed or self.settings.run.on_failed_save == "stop":
                raise StoppedError(NOT_SAVED, str(error)) from None
            self.say(f"warning: {error}; the run goes on")
        finally:
            self.pause += time.perf_counter() - started

    def best_step(self) -> int | None:
        """The step that was evaluated best by `run.keep_best`: the lowest Fréchet distance, the highest of others."""
        name = self.settings.run.keep_best
        if name is None:
            return None
        found = {key: getattr(scores, name) for key, scores in self.scores.items() if key.startswith("step-")}
        sign = -1 if name.startswith("frechet") else 1
        best = max(found, key=lambda key: sign * found[key], default=None)
        return None if best is None else int(best.removeprefix("step-"))

    def asked_to_stop(self) -> bool:
        """Whether a signal has reached any of the processes."""
        return anywhere(self.signals.received is not None)

    def leave(self) -> None:
        """End the run here, at its last checkpoint.

        Raises:
            StoppedError: always.
        """
        name = self.signals.received or "a signal to another process"
        newest = checkpoints_in(self.folder / "checkpoints")[-1]
        raise StoppedError(STOPPED, f"by {name}, saved in {newest}; start again with run.resume=auto to go on")

    def say(self, text: str) -> None:
        if self.tracker:
            self.tracker.say(text)

    # -- what is logged

    @property
    def skipped(self) -> int:
        """The updates so far that the engines skipped, since losses or gradients were not finite."""
        return int(self.trainer.generator.skipped_steps + self.trainer.guidance.skipped_steps)

    def diagnosis(self, count: int) -> str:
        """What was not finite in the last step, on any process, and for which prompts."""
        found: list[Any] = [None] * self.trainer.world
        dist.all_gather_object(found, self.trainer.trouble)
        prompts: dict[str, list[Any]] = {}
        for name, drawn in itertools.chain.from_iterable(found):
            prompts.setdefault(name, []).extend(drawn)
        named = "; ".join(f"{name} for {', '.join(map(repr, drawn[:4]))}" for name, drawn in prompts.items())
        return (
            f"{count} steps in a row were skipped, since a loss or gradient was not finite: "
            f"{named or 'the gradient of a network, from finite losses'}; the state is saved in "
            f"{checkpoints_in(self.folder / 'checkpoints')[-1]}"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        values = mean_over_processes(values)
        if self.tracker:
            values = rules.completed(values, self.history)
            self.history = rules.remembered([*self.history, {"step": step, **values}])
            self.tracker.log(step, values)

    def look(self) -> dict[str, float]:
        """What early warning sees of the averaged student, beside the teacher, which it looks at once."""
        assert self.watch is not None
        started = time.perf_counter()
        guidance, shift = self.settings.guidance.cfg, self.settings.rollout.shift
        if self.teachers_look is None:
            self.teachers_look = self.watch.look(self.teacher, self._many_steps(), "euler", guidance, shift)
        sampling = sampling_settings(self.settings, self.session.family)
        with self.average.applied():
            student = self.watch.look(
                self.trainer.generator, sampling["steps"], sampling["method"], shift=sampling["shift"]
            )
        return {**compared(student, self.teachers_look), "watch_seconds": time.perf_counter() - started}

    def judge(self) -> str | None:
        """Say which rules hold; the line of one that stops the run, on which all processes agree."""
        lines: list[str | None] = [None]
        if self.tracker:
            for alarm in rules.judge(self.settings.rules, rules.evaluations(self.history)):
                self.tracker.warn(alarm.step, str(alarm))
                if alarm.rule.action == "stop":
                    lines = [str(alarm)]
        dist.broadcast_object_list(lines)
        return lines[0]

    def stop(self, line: str) -> None:
        """Leave a report of what there is, and end the run.

        Raises:
            StoppedError: always.
        """
        self.report()
        newest = checkpoints_in(self.folder / "checkpoints")[-1]
        raise StoppedError(EARLY_WARNING, f"{line}; saved in {newest}")

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

    def show(self) -> None:
        """Draw and score the student where this step is one to do so."""
        tracking, step = self.settings.tracking, self.trainer.step
        if _due(step, tracking.samples.every):
            self.sample_student(f"student-{step:08d}")
        if tracking.evaluation and _due(step, tracking.evaluation.every) and step < self.settings.run.steps:
            self.evaluate_student(f"step-{step}", f"student at step {step}")

    def end_stage(self, stage: str) -> None:
        """Keep what the student is now: a row of samples, and its scores."""
        self.sample_student(f"student-{stage}")
        if self.settings.tracking.evaluation:
            self.evaluate_student(
                stage, f"student after {stage.replace('_', ' ')}, {_count(self.settings.rollout.steps)}"
            )

    def finish(self) -> None:
        """Score the student beside its references, export it, and write the report.

        The training is saved; a signal ends this between two of its parts.
        """
        self.end_stage(list(self.settings.stages)[-1])
        if self.settings.tracking.evaluation:
            self.evaluate_references()
        self.report()

    # -- evaluation

    @property
    def evaluator(self) -> Evaluator:
        if self._evaluator is None:
            assert self.settings.tracking.evaluation is not None
            evaluation = self.settings.tracking.evaluation
            rewards = self.session.rewards if evaluation.rewards else ()
            self._evaluator = Evaluator(evaluation, self.session.family, self.session.device, rewards)
        return self._evaluator

    def evaluate_references(self) -> None:
        """The rows that the student is compared with: real pictures, and the teacher at several step counts."""
        assert self.settings.tracking.evaluation is not None
        guidance, shift = self.settings.guidance.cfg, self.settings.rollout.shift
        self._score("real", self.evaluator.real)
        for steps in self.settings.tracking.evaluation.teacher_steps:
            name = f"teacher, {_count(steps)}"
            self._score(
                f"teacher-{steps}",
                partial(self.evaluator.model, name, self.teacher, steps, "euler", guidance, shift),
            )

    def evaluate_student(self, key: str, name: str) -> None:
        """Score the averaged student, sampled as it is trained, under `key` of evaluation.json."""
        sampling = sampling_settings(self.settings, self.session.family)
        with self.average.applied():
            self._score(
                key,
                partial(
                    self.evaluator.model,
                    name,
                    self.trainer.generator,
                    sampling["steps"],
                    sampling["method"],
                    shift=sampling["shift"],
                ),
            )

    def _score(self, key: str, measure: Callable[[], Scores]) -> None:
        if key in self.scores:
            return
        if self.trainer.step == self.settings.run.steps and self.asked_to_stop():
            self.leave()
        self.scores[key] = measure()
        if self.tracker:
            values = self.scores[key]
            self.unhurried("evaluation.json", partial(save_scores, self.folder, self.scores))
            self.say(
                f"{values.name}: FD {values.frechet:.2f}, recall {values.recall:.3f}, accuracy {values.accuracy:.3f}"
            )

    # -- pictures

    def sample_teacher(self) -> None:
        """The teacher's rows, once: with all its steps, and with the student's few."""
        for steps in (self._many_steps(), self.settings.rollout.steps):
            self._save_samples(
                f"teacher-{steps}",
                self.teacher,
                steps,
                "euler",
                self.settings.guidance.cfg,
                self.settings.rollout.shift,
            )

    def _many_steps(self) -> int:
        evaluation = self.settings.tracking.evaluation
        return max(evaluation.teacher_steps, default=50) if evaluation else 50

    def sample_student(self, name: str) -> None:
        sampling = sampling_settings(self.settings, self.session.family)
        with self.average.applied():
            self._save_samples(
                name, self.trainer.generator, sampling["steps"], sampling["method"], shift=sampling["shift"]
            )

    def _save_samples(
        self, name: str, network: Any, steps: int, method: str, guidance: float = 1.0, shift: float = 1.0
    ) -> None:
        family, samples = self.session.family, self.settings.tracking.samples
        images = draw_samples(
            family, network, samples, self.session.device, steps, method, guidance, shift, self._batch()
        )
        if self.tracker:
            row = sample_row(images)
            self.unhurried(f"samples/{name}.png", partial(save_row, row, self.folder / "samples", name))
            self.tracker.picture(self.trainer.step, name, row)

    def _batch(self) -> int:
        """Pictures at once: as many as a step of training makes."""
        return self.settings.optim.batch_size // self.trainer.world // self.settings.optim.accumulation

    def report(self) -> None:
        """Have the first process write the report; the others wait for it.

        Raises:
            StoppedError: on all of them, if it could not.
        """

        def write() -> None:
            try:
                self.unhurried.finish()
                self.write_report()
            except (OSError, SafetensorError) as error:
                reason = f"the report in {self.folder} could not be written ({reason_of(error)})"
                newest = checkpoints_in(self.folder / "checkpoints")[-1]
                again = "make space, and start again with run.resume=auto to write the report"
                raise StoppedError(NOT_SAVED, f"{reason}; all is saved in {newest}; {again}") from None

        agreed(write)

    def write_report(self) -> None:
        """The table, the rows of samples below each other, the curves, and how to generate."""
        order = ["real", *(k for k in self.scores if k.startswith("teacher")), *self.settings.stages]
        scores = {key: self.scores[key] for key in order if key in self.scores}
        few = self.settings.rollout.steps
        titles = {f"teacher-{steps}": f"teacher\n{_count(steps)}" for steps in (self._many_steps(), few)}
        titles |= {f"student-{stage}": f"student\n{stage.replace('_', ' ')}" for stage in self.settings.stages}
        rows = {}
        for stem, title in titles.items():
            path = self.folder / "samples" / f"{stem}.png"
            if path.exists():
                with Image.open(path) as image:
                    rows[title] = image.convert("RGB")
        save_png(labelled_rows(rows), self.folder / "before_after.png")
        report.draw_curves(self.folder, self.settings)
        family, student = self.session.family, self.folder / "student"
        newest = checkpoints_in(self.folder / "checkpoints")[-1]
        export_student(student, self.settings, newest, scores)
        lora = self.settings.model.generator_lora is not None
        command = family.usage(student, sampling_settings(self.settings, family), lora)
        report.write_summary(self.folder, self.settings, scores, command)
        if scores:
            report.print_table(scores)
        print(f"Wrote {self.folder}/: summary.md, before_after.png, curves.png, student/, checkpoints/")
        print(f"Generate from the student:\n\n{command}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The run's folder, made and held by rank 0 for as long as this is open.

    Raises:
        UserError: on every process, if another run holds it, or it cannot be made.
    """
    held: list[IO[str]] = []

    def take() -> None:
        with naming("run.output"):
            folder.mkdir(parents=True, exist_ok=True)
            held.append(hold(folder))

    agreed(take)
    try:
        yield
    finally:
        for file in held:
            file.close()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _due(step: int, every: int) -> bool:
    return min(step, every) > 0 and step % every == 0


def _count(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"
