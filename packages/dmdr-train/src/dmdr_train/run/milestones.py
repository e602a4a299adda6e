"""What a run shows of teacher and student: rows of samples, scores, and the report."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dmdr_models.drawing.images import save_png
from PIL import Image
from safetensors import SafetensorError

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.base.errors import NOT_SAVED, StoppedError, naming
from dmdr_train.checkpoint.background_writes import Unhurried, reason_of
from dmdr_train.checkpoint.find import run_of
from dmdr_train.checkpoint.save import NotSavedError, save_student
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.collectives import agreed
from dmdr_train.evaluation.evaluator import Evaluator
from dmdr_train.evaluation.sample_sheets import draw_samples, labelled_rows, sample_row, save_row
from dmdr_train.evaluation.scores import Scores, read_scores, save_scores
from dmdr_train.recipe.load import is_number
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.curves import draw_curves
from dmdr_train.reporting.student_export import export_student, sampling_settings, usage
from dmdr_train.reporting.summary import write_summary
from dmdr_train.reporting.tables import print_table
from dmdr_train.run.build import Session
from dmdr_train.tracking.trackers import Tracker
from dmdr_train.training.trainer import Teacher

RESCUED = "rescued-student"
"""The folder that `Results.rescue` writes, beside student/."""


class Drawing(NamedTuple):
    """Who draws, and how."""

    network: Any
    steps: int
    method: str
    guidance: float
    shift: float


class Results:
    """Only rank 0 writes; whatever calls a network is called by every process.

    Args:
        resumed: the checkpoint that the run goes on from; the scores and samples of the run until there are kept.
        interrupted: is called before every evaluation, and may end the run.
    """

    def __init__(
        self,
        settings: Recipe,
        session: Session,
        average: Average,
        resumed: Path | None,
        interrupted: Callable[[], object] = lambda: None,
    ) -> None:
        self.settings = settings
        self.session = session
        self.average = average
        self.interrupted = interrupted
        self.folder = Path(settings.run.output)
        self.tracker: Tracker | None = None
        self.unhurried = Unhurried(self.say)
        self.before = run_of(resumed) if resumed else None
        self.scores: dict[str, Scores] = {}
        if self.before and settings.tracking.evaluation:  # without an evaluation, nothing says how they were taken
            self.scores = {key: row for key, row in read_scores(self.before).items() if self.still_true(key)}
        self.evaluator: Evaluator | None = None
        if settings.tracking.evaluation:
            rewards = session.rewards if settings.tracking.evaluation.rewards else ()
            with naming("tracking.evaluation"):
                self.evaluator = Evaluator(settings.tracking.evaluation, session.family, session.device, rewards)

    def still_true(self, key: str) -> bool:
        """Whether a score or a sample of an earlier session is of a step that this one starts at or after."""
        kind, _, step = key.rpartition("-")
        at_step = kind in ("step", "student") and is_number(step)
        taken = int(step) if at_step else self.settings.stages.get(key.removeprefix("student-"), 0)
        return taken <= self.session.trainer.step

    def say(self, text: str) -> None:
        if self.tracker:
            self.tracker.say(text)

    # -- who draws

    def teacher(self, steps: int | None = None) -> Drawing:
        """The teacher, with its guidance; without a number, with the most steps that it is evaluated with."""
        evaluation = self.settings.tracking.evaluation
        many = max(evaluation.teacher_steps, default=50) if evaluation else 50
        guidance, shift = self.settings.guidance.cfg, self.settings.rollout.shift
        return Drawing(Teacher(self.session.trainer.guidance), steps or many, "euler", guidance, shift)

    def student(self) -> Drawing:
        """The generator, sampled as it is trained; within `average.applied` it is the averaged one."""
        sampling = sampling_settings(self.settings, self.session.family)
        return Drawing(
            self.session.trainer.generator,
            sampling["steps"],
            sampling["method"],
            sampling["guidance"],
            sampling["shift"],
        )

    @property
    def batch(self) -> int:
        """Pictures at once: as many as a step of training makes."""
        return self.settings.optim.batch_size // self.session.trainer.world // self.settings.optim.accumulation

    # -- samples and scores

    def begin(self) -> None:
        """The teacher's rows, once: with all its steps, and with the student's few."""
        agreed(self.take_along)
        for drawing in (self.teacher(), self.teacher(self.settings.rollout.steps)):
            name = f"teacher-{drawing.steps}"
            path = self.folder / "samples" / f"{name}.png"
            if self.session.trainer.step == 0 or not agreed(path.exists):
                self.sample(name, drawing)

    def take_along(self) -> None:
        """Copy what the run was in another folder: its samples and scores until here."""
        if not (self.tracker and self.before) or self.before.resolve() == self.folder.resolve():
            return
        if self.scores:
            self.unhurried("evaluation.json", partial(save_scores, self.folder, self.scores))
        for path in self.before.glob("samples/*.png"):
            if self.still_true(path.stem):
                to = self.folder / "samples" / path.name
                self.unhurried(f"samples/{path.name}", partial(write_whole, to, partial(shutil.copyfile, path)))

    def show(self) -> None:
        """Draw and score the student where this step is one to do so."""
        tracking, step = self.settings.tracking, self.session.trainer.step
        if due(step, tracking.samples.every):
            self.sample_student(f"student-{step:08d}")
        if tracking.evaluation and due(step, tracking.evaluation.every) and step < self.settings.run.steps:
            self.evaluate_student(f"step-{step}", f"student at step {step}")

    def end_stage(self, stage: str) -> None:
        """Keep what the student is now: a row of samples, and its scores."""
        self.sample_student(f"student-{stage}")
        self.evaluate_student(stage, f"student after {stage.replace('_', ' ')}, {_count(self.settings.rollout.steps)}")

    def sample_student(self, name: str) -> None:
        with self.average.applied():
            self.sample(name, self.student())

    def sample(self, name: str, drawing: Drawing) -> None:
        """Keep a row of samples as samples/name.png."""
        session, samples = self.session, self.settings.tracking.samples
        images = draw_samples(session.family, samples, session.device, self.batch, *drawing)
        if self.tracker:
            row = sample_row(images)
            self.unhurried(f"samples/{name}.png", partial(save_row, row, self.folder / "samples", name))
            self.tracker.picture(session.trainer.step, name, row)

    def evaluate_student(self, key: str, name: str) -> None:
        """Score the averaged student under `key` of evaluation.json."""
        if self.evaluator:
            self.score(key, partial(self._student_scores, name))

    def _student_scores(self, name: str) -> Scores:
        assert self.evaluator
        with self.average.applied():
            return self.evaluator.model(name, *self.student())

    def evaluate_references(self) -> None:
        """The rows that the student is compared with: real pictures, and the teacher at several step counts."""
        if self.evaluator:
            self.score("real", self.evaluator.real)
            for steps in self.evaluator.settings.teacher_steps:
                name = f"teacher, {_count(steps)}"
                self.score(f"teacher-{steps}", partial(self.evaluator.model, name, *self.teacher(steps)))

    def score(self, key: str, measure: Callable[[], Scores]) -> None:
        """Keep what `measure()` finds, unless an earlier session did."""
        if key in self.scores:
            return
        self.interrupted()
        self.scores[key] = found = measure()
        if self.tracker:
            self.unhurried("evaluation.json", partial(save_scores, self.folder, self.scores))
            self.say(f"{found.name}: FD {found.frechet:.2f}, recall {found.recall:.3f}, accuracy {found.accuracy:.3f}")

    # -- the report

    def rescue(self) -> str:
        """Write the student alone, where the last checkpoint of the run could not be written; say whether that went.

        What is written here goes when the run has written its student.
        """
        weights, made = self.folder / ".weights-of-student.partial", self.folder / RESCUED

        def write() -> str:
            try:
                export_student(made, self.settings, weights)
                return f"; its student, and no more, is in {made}"
            except (OSError, SafetensorError) as error:
                return f"; nor could its student ({reason_of(error)})"
            finally:
                for path in (weights, made.with_name(f".{made.name}.partial")):
                    shutil.rmtree(path, ignore_errors=True)

        try:
            save_student(weights, self.session.trainer, self.average)
        except NotSavedError as error:
            agreed(lambda: shutil.rmtree(weights, ignore_errors=True))
            return f"; nor could its student ({error})"
        return agreed(write)

    def report(self, newest: Path) -> None:
        """Have the first process write the report, on the checkpoint `newest`; the others wait for it.

        Raises:
            StoppedError: on all of them, if it could not.
        """

        def write() -> None:
            assert self.tracker
            try:
                self.tracker.rows.finish()
                self.unhurried.finish()
                self.write_report(newest)
            except (OSError, SafetensorError) as error:
                reason = f"the report in {self.folder} could not be written ({reason_of(error)})"
                again = "make space, and start again with run.resume=auto to write the report"
                raise StoppedError(NOT_SAVED, f"{reason}; all is saved in {newest}; {again}") from None

        agreed(write)

    def write_report(self, newest: Path) -> None:
        """The table, the rows of samples below each other, the curves, the student, and how to generate."""
        order = ["real", *(k for k in self.scores if k.startswith("teacher")), *self.settings.stages]
        scores = {key: self.scores[key] for key in order if key in self.scores}
        save_png(labelled_rows(self.rows()), self.folder / "before_after.png")
        draw_curves(self.folder, self.settings)
        family, student = self.session.family, self.folder / "student"
        export_student(student, self.settings, newest, scores)
        shutil.rmtree(self.folder / RESCUED, ignore_errors=True)
        command = usage(self.settings, family, student)
        write_summary(self.folder, self.settings, scores, command)
        if scores:
            print_table(scores)
        print(f"Wrote {self.folder}/: summary.md, before_after.png, curves.png, student/, checkpoints/")
        print(f"Generate from the student:\n\n{command}")

    def rows(self) -> dict[str, Image.Image]:
        """The teacher's and each stage's row of samples, by title, those that are there."""
        few = self.settings.rollout.steps
        titles = {f"teacher-{steps}": f"teacher\n{_count(steps)}" for steps in (self.teacher().steps, few)}
        titles |= {f"student-{stage}": f"student\n{stage.replace('_', ' ')}" for stage in self.settings.stages}
        rows = {}
        for stem, title in titles.items():
            path = self.folder / "samples" / f"{stem}.png"
            if path.exists():
                with Image.open(path) as image:
                    rows[title] = image.convert("RGB")
        return rows


def due(step: int, every: int) -> bool:
    """Whether something is to be done at this step that is done every so many; 0 is never."""
    return min(step, every) > 0 and step % every == 0


def _count(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"
