"""The results of a run: rows of samples, scores, and the report."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dmdr_models.drawing.images import save_png
from PIL import Image
from safetensors import SafetensorError

from dmdr_train.base.atomic_files import write_whole
from dmdr_train.base.errors import StoppedError
from dmdr_train.base.exit_codes import NOT_SAVED
from dmdr_train.checkpoint.background_writes import Unhurried, reason_of
from dmdr_train.checkpoint.find import run_of
from dmdr_train.checkpoint.save import NotSavedError, save_student
from dmdr_train.distributed.averaged_weights import Average
from dmdr_train.distributed.collectives import agreed
from dmdr_train.evaluation.captioned_sheets import Layout, draw_sheet
from dmdr_train.evaluation.evaluator import Evaluator
from dmdr_train.evaluation.open_evaluator import open_evaluator
from dmdr_train.evaluation.sample_sheets import captions, draw_samples, pictures, sample_prompts, save_sheet
from dmdr_train.evaluation.scores import Scores, read_scores, save_scores
from dmdr_train.evaluation.seeded_sampling import SamplingPlan, counted, student_plan, teacher_name, teacher_plan
from dmdr_train.recipe.explain import is_number
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.curves import draw_curves
from dmdr_train.reporting.model_card import usage
from dmdr_train.reporting.report import refresh_report
from dmdr_train.reporting.student_export import export_student
from dmdr_train.reporting.summary import write_summary
from dmdr_train.reporting.tables import headline, print_table
from dmdr_train.tracking.run_tracker import RunTracker
from dmdr_train.training.guide import Teacher
from dmdr_train.training.trainer import Trainer

RESCUED = "rescued-student"
"""The folder that `Results.rescue` writes, in the run's folder."""


class Drawing(NamedTuple):
    """A network, and how it is sampled."""

    network: Any
    plan: SamplingPlan


class Results:
    """Draws, scores and reports. Every process calls the methods that use a network; only rank 0 writes.

    Args:
        resumed: the checkpoint that the run resumes from; scores and samples up to its step are kept.
        interrupted: called before every evaluation; it may end the run.
    """

    def __init__(
        self,
        settings: Recipe,
        trainer: Trainer,
        average: Average,
        resumed: Path | None,
        interrupted: Callable[[], object] = lambda: None,
    ) -> None:
        self.settings = settings
        self.trainer = trainer
        self.average = average
        self.interrupted = interrupted
        self.folder = Path(settings.run.output)
        self.tracker: RunTracker | None = None
        self.unhurried = Unhurried(self.say)
        self.before = run_of(resumed) if resumed else None
        self.scores: dict[str, Scores] = {}
        if self.before and settings.tracking.evaluation:  # without an evaluation, it is unknown how they were measured
            self.scores = {key: row for key, row in read_scores(self.before).items() if self.still_true(key)}
        self.evaluator: Evaluator | None = None
        if settings.tracking.evaluation:
            self.evaluator = open_evaluator(settings, trainer.family, trainer.device, trainer.rewards)

    def still_true(self, key: str) -> bool:
        """Whether a score or sample of an earlier session belongs to a step that is not trained again."""
        kind, _, step = key.rpartition("-")
        at_step = kind in ("step", "student") and is_number(step)
        taken = int(step) if at_step else self.settings.stages.get(key.removeprefix("student-"), 0)
        return taken <= self.trainer.step

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.tracker:
            self.tracker.say(text)

    # -- networks

    def teacher(self, steps: int | None = None) -> Drawing:
        """The teacher that the student is compared with; by default with the most steps of its evaluation."""
        evaluation = self.settings.tracking.evaluation
        many = max(evaluation.teacher_steps, default=50) if evaluation else 50
        return Drawing(Teacher(self.trainer.guidance), teacher_plan(self.settings, steps or many))

    def student(self) -> Drawing:
        """The generator, sampled as it is trained; within `average.applied`, the averaged generator."""
        return Drawing(self.trainer.generator, student_plan(self.settings))

    @property
    def batch(self) -> int:
        """The number of pictures that are drawn at once: a micro-batch of the training."""
        return self.settings.optim.batch_size // self.trainer.world // self.settings.optim.accumulation

    # -- samples and scores

    def begin(self) -> None:
        """Draw the teacher's rows of samples, if they do not exist: with all its steps, and with the student's few."""
        agreed(self.take_along)
        for drawing in (self.teacher(), self.teacher(self.settings.rollout.steps)):
            name = f"teacher-{drawing.plan.steps}"
            path = self.folder / "samples" / f"{name}.png"
            if self.trainer.step == 0 or not agreed(path.exists):
                self.sample(name, drawing)

    def take_along(self) -> None:
        """Copy samples and scores up to this step, if the run is resumed from another folder."""
        if not (self.tracker and self.before) or self.before.resolve() == self.folder.resolve():
            return
        if self.scores:
            self.unhurried("evaluation.json", partial(save_scores, self.folder, self.scores))
        for path in self.before.glob("samples/*.png"):
            if self.still_true(path.stem):
                to = self.folder / "samples" / path.name
                self.unhurried(f"samples/{path.name}", partial(write_whole, to, partial(shutil.copyfile, path)))

    def show(self) -> None:
        """Draw and score the student, if the recipe asks for it at this step."""
        tracking, step = self.settings.tracking, self.trainer.step
        if due(step, tracking.samples.every):
            self.sample_student(f"student-{step:08d}")
        if tracking.evaluation and due(step, tracking.evaluation.every) and step < self.settings.run.steps:
            self.evaluate_student(f"step-{step}", f"student at step {step}")

    def end_stage(self, stage: str) -> None:
        """Draw and score the student at the end of a stage."""
        self.sample_student(f"student-{stage}")
        self.evaluate_student(stage, f"student after {stage.replace('_', ' ')}, {counted(self.settings.rollout.steps)}")

    def sample_student(self, name: str) -> None:
        """Draw a row of samples of the averaged student."""
        with self.average.applied():
            self.sample(name, self.student())

    def sample(self, name: str, drawing: Drawing) -> None:
        """Draw samples and write their sheet to samples/name.png."""
        trainer, samples = self.trainer, self.settings.tracking.samples
        images = draw_samples(trainer.family, samples, trainer.device, self.batch, *drawing)
        if self.tracker:
            sheet = draw_sheet({"": pictures(images)}, self.captions)
            self.unhurried(f"samples/{name}.png", partial(save_sheet, sheet, self.folder / "samples", name))
            self.tracker.picture(trainer.step, name, sheet)

    @property
    def captions(self) -> tuple[str, ...]:
        """What stands under the samples."""
        return captions(sample_prompts(self.trainer.family.num_classes, self.settings.tracking.samples))

    def evaluate_student(self, key: str, name: str) -> None:
        """Score the averaged student, and write the scores under `key` of evaluation.json."""
        if self.evaluator:
            self.score(key, partial(self._student_scores, name))

    def _student_scores(self, name: str) -> Scores:
        assert self.evaluator
        with self.average.applied():
            return self.evaluator.model(name, *self.student())

    def evaluate_references(self) -> None:
        """Score what the student is compared with: real pictures, and the teacher with several numbers of steps."""
        if self.evaluator:
            if self.evaluator.settings.has_pictures:
                self.score("real", self.evaluator.real)
            for steps in self.evaluator.settings.teacher_steps:
                name = teacher_name(self.settings, steps)
                self.score(f"teacher-{steps}", partial(self.evaluator.model, name, *self.teacher(steps)))

    def score(self, key: str, measure: Callable[[], Scores]) -> None:
        """Call `measure` and write its scores under `key` of evaluation.json, unless an earlier session did."""
        if key in self.scores:
            return
        self.interrupted()
        self.scores[key] = found = measure()
        if self.tracker:
            self.unhurried("evaluation.json", partial(save_scores, self.folder, self.scores))
            self.say(f"{found.name}: {headline(found)}")
            if found.broken:
                self.say(f"warning: {len(found.broken)} of these pictures are not finite; no score counts them")

    # -- the report

    def rescue(self) -> str:
        """Write only the student, after the last checkpoint could not be written.

        The folder is removed when a resumed run has written its student.

        Returns:
            A text for the end of the error line: where the student is, or why it could not be written either.
        """
        weights, made = self.folder / ".weights-of-student.partial", self.folder / RESCUED

        def write() -> str:
            try:
                export_student(made, self.settings, weights)
                return f"; its student, and no more, is in {made}"
            except (OSError, SafetensorError) as error:
                return f"; nor could its student ({reason_of(error)})"
            finally:
                shutil.rmtree(weights, ignore_errors=True)

        try:
            save_student(weights, self.trainer, self.average)
        except NotSavedError as error:
            agreed(lambda: shutil.rmtree(weights, ignore_errors=True))
            return f"; nor could its student ({error})"
        return agreed(write)

    def report(self, newest: Path) -> None:
        """Write the report on the checkpoint `newest`, on rank 0, while the other processes wait.

        Raises:
            StoppedError: on every process, if the report could not be written.
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
        """Write the pictures, the student, summary.md and report.html, and print the table and the usage."""
        order = ["real", *(k for k in self.scores if k.startswith("teacher")), *self.settings.stages]
        scores = {key: self.scores[key] for key in order if key in self.scores}
        save_png(draw_sheet(self.rows(), self.captions), self.folder / "before_after.png")
        draw_curves(self.folder, self.settings)
        student = self.folder / "student"
        export_student(student, self.settings, newest, scores)
        shutil.rmtree(self.folder / RESCUED, ignore_errors=True)
        command = usage(self.settings, self.trainer.family, student)
        write_summary(self.folder, self.settings, scores, command)
        if scores:
            print_table(scores)
        warning = refresh_report(self.folder, self.settings)
        if warning:
            self.say(warning)
        page = "" if warning else "report.html, "
        print(f"Wrote {self.folder}/: {page}summary.md, before_after.png, curves.png, student/, checkpoints/")
        print(f"Generate from the student:\n\n{command}")

    def rows(self) -> dict[str, list[Image.Image]]:
        """Read the samples of the teacher and of each stage, by title, as far as sheets of these prompts exist."""
        few = self.settings.rollout.steps
        titles = {f"teacher-{steps}": f"teacher\n{counted(steps)}" for steps in (self.teacher().plan.steps, few)}
        titles |= {f"student-{stage}": f"student\n{stage.replace('_', ' ')}" for stage in self.settings.stages}
        layout = Layout(self.captions, *self.trainer.family.size)
        rows = {}
        for stem, title in titles.items():
            path = self.folder / "samples" / f"{stem}.png"
            if path.exists():
                with Image.open(path) as image:
                    rows[title] = layout.cells(image.convert("RGB"))
        return {title: cells for title, cells in rows.items() if cells}


def due(step: int, every: int) -> bool:
    """Whether a step is a multiple of `every`; never for step 0 or `every` 0."""
    return min(step, every) > 0 and step % every == 0
