"""A run from start to end: train, log, sample, checkpoint, evaluate, report."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from dmdr_models.images import save_png
from PIL import Image

from dmdr_train import checkpoint, report, rules
from dmdr_train.average import Average
from dmdr_train.engines import choose_device, mean_over_processes, start_processes
from dmdr_train.errors import EARLY_WARNING, RunStopped, naming
from dmdr_train.evaluation import Evaluator, Scores, read_scores, save_scores
from dmdr_train.export import export_student, sampling_settings
from dmdr_train.pictures import draw_samples, labelled_rows, save_row
from dmdr_train.preflight import RUN_FILE
from dmdr_train.recipe import Recipe
from dmdr_train.recipe_file import dump_recipe
from dmdr_train.session import Session, build
from dmdr_train.tracking import Tracker
from dmdr_train.trainer import Teacher
from dmdr_train.watch import Look, Watch, compared, pooled_pixels


def run(settings: Recipe) -> None:
    """Carry out a recipe that `preflight.check` has passed; every process calls this."""
    device = choose_device(settings.run, settings.optim.precision, settings.optim.eight_bit)
    resume_from = checkpoint.find_checkpoint(settings)
    start_processes(device)
    Run(settings, build(settings, device), resume_from).carry_out()
    dist.destroy_process_group()


def dry_run(settings: Recipe) -> dict[str, float]:
    """Build everything and take one step, every objective included; nothing is written."""
    device = choose_device(settings.run, settings.optim.precision, settings.optim.eight_bit)
    start_processes(device)
    session = build(settings, device)
    session.trainer.step = max(objective.start for objective in settings.objectives)
    logs = mean_over_processes(session.trainer.train_step())
    dist.destroy_process_group()
    return logs


class Run:
    """The outer loop. Only rank 0 writes; whatever calls a network is called by every process."""

    def __init__(self, settings: Recipe, session: Session, resume_from: Path | None):
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
        if self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / RUN_FILE).write_text(dump_recipe(self.settings), encoding="utf-8")
            self.tracker = Tracker(self.folder, self.settings, self.trainer.step)
        dist.barrier()
        if self.trainer.step == 0:
            self.sample_teacher()
        self.train()
        self.finish()

    def train(self) -> None:
        """Step until `run.steps`; log, save, sample and evaluate on the way."""
        tracking, steps = self.settings.tracking, self.settings.run.steps
        ends = {end: stage for stage, end in self.settings.stages.items()}
        seconds, since = 0.0, self.trainer.step
        while self.trainer.step < steps:
            if self.trainer.step in ends:
                self.end_stage(ends[self.trainer.step])
            started = time.perf_counter()
            logs = self.trainer.train_step()
            self.average.update()
            seconds += time.perf_counter() - started
            step = self.trainer.step
            if self.tracker:
                self.tracker.advance()
            looked = self.look() if _due(step, self.settings.watch.every) else {}
            if step % tracking.log_every == 0 or looked or step == steps:
                times = {"train_seconds": seconds, "seconds_per_step": seconds / (step - since)}
                self.log(step, {**logs, **self._engine_values(), **times, **looked})
            alarm = self.judge() if looked else None
            if _due(step, self.settings.run.checkpoint_every) or step == steps or alarm:
                checkpoint.save(self.folder / "checkpoints", self.settings, self.trainer, self.average)
            if alarm:
                self.stop(alarm)
            if _due(step, tracking.samples.every):
                self.sample_student(f"student-{step:08d}")
            if tracking.evaluation and _due(step, tracking.evaluation.every) and step < steps:
                self.evaluate_student(f"step-{step}", f"student at step {step}")

    def log(self, step: int, values: dict[str, float]) -> None:
        values = mean_over_processes(values)
        if self.tracker:
            values = rules.completed(values, self.history)
            self.history = rules.remembered([*self.history, {"step": step, **values}])
            self.tracker.log(step, values)
        broken = [name for name, value in values.items() if name.startswith("loss/") and not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"{broken[0]} is {values[broken[0]]} at step {step}; see {self.folder}/metrics.jsonl"
            )

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
        """Leave a report of what there is, and end the run."""
        if self.tracker:
            self.write_report()
            self.tracker.close()
        dist.barrier()
        raise RunStopped(EARLY_WARNING, line)

    def _engine_values(self) -> dict[str, float]:
        values = {}
        for name, engine in (("generator", self.trainer.generator), ("fake_score", self.trainer.guidance)):
            values[f"lr/{name}"] = float(engine.get_lr()[0])
            norm = engine.get_global_grad_norm()
            if norm is not None:
                values[f"grad_norm/{name}"] = float(norm)
        return values

    def end_stage(self, stage: str) -> None:
        """Keep what the student is now: a row of samples, and its scores."""
        self.sample_student(f"student-{stage}")
        if self.settings.tracking.evaluation:
            self.evaluate_student(
                stage, f"student after {stage.replace('_', ' ')}, {_count(self.settings.rollout.steps)}"
            )

    def finish(self) -> None:
        """Score the student beside its references, export it, and write the report."""
        self.end_stage(list(self.settings.stages)[-1])
        if self.settings.tracking.evaluation:
            self.evaluate_references()
        if self.first:
            self.write_report()
        dist.barrier()
        if self.tracker:
            self.tracker.close()

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
        self.scores[key] = measure()
        if self.tracker:
            values = self.scores[key]
            save_scores(self.folder, self.scores)
            self.tracker.say(
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
            row = save_row(family, images, self.folder / "samples", name)
            self.tracker.picture(self.trainer.step, name, row)

    def _batch(self) -> int:
        """Pictures at once: as many as a step of training makes."""
        return self.settings.optim.batch_size // self.trainer.world // self.settings.optim.accumulation

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
        newest = checkpoint.checkpoints_in(self.folder / "checkpoints")[-1]
        export_student(student, self.settings, newest, scores)
        lora = self.settings.model.generator_lora is not None
        command = family.usage(student, sampling_settings(self.settings, family), lora)
        report.write_summary(self.folder, self.settings, scores, command)
        if scores:
            report.print_table(scores)
        print(f"Wrote {self.folder}/: summary.md, before_after.png, curves.png, student/, checkpoints/")
        print(f"Generate from the student:\n\n{command}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _count(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"
