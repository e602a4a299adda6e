"""Scoring the networks of a run: teacher, checkpoints and student, on the recipe's device and over its processes."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dmdr_models.families.protocols import Family
from dmdr_models.folder.fingerprints import content_fingerprint
from torch import nn
from tqdm import tqdm

from dmdr_train.base.atomic_files import fingerprint, write_whole
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.find import checkpoints_in, newest, step_of
from dmdr_train.checkpoint.input_fingerprints import fingerprints
from dmdr_train.checkpoint.load import load_weights
from dmdr_train.checkpoint.manifest import RECIPE, STUDENT, read_manifest
from dmdr_train.distributed.collectives import agreed, said_anywhere
from dmdr_train.distributed.device import DTYPES, choose_device
from dmdr_train.distributed.lost_process import Peers
from dmdr_train.distributed.process_group import processes
from dmdr_train.distributed.shared_folder import check_shared
from dmdr_train.evaluation.evaluator import Source
from dmdr_train.evaluation.finished_batches import FinishedBatches
from dmdr_train.evaluation.open_evaluator import open_evaluator, scored_by
from dmdr_train.evaluation.scores import FOLDER, Scores, save_scores
from dmdr_train.evaluation.seeded_sampling import SamplingPlan, counted, student_plan, teacher_name, teacher_plan
from dmdr_train.recipe.load import dump_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.tables import markdown_table
from dmdr_train.training.networks import load_family, load_network, make_generator, open_decoder


def evaluate_run(settings: Recipe, run: Path, rows: Sequence[str]) -> dict[str, Scores]:
    """Score the rows of a run by its recipe's evaluation, which must be set, and write RUN/evaluation.

    Args:
        rows: which of `real`, `teacher`, `checkpoints` and `student`.

    Returns:
        The scores by key, on every process: `real`, `teacher-STEPS`, `step-STEP` for each checkpoint before the
        newest, and `student` for the newest.

    Raises:
        UserError: on every process, if there is no such row, or a file of the run or of the evaluation cannot be used.
    """
    device = choose_device(settings.run, settings.optim.precision)
    with processes(device, settings.run.timeout):
        peers = Peers("the same command goes on")
        with peers.expected():
            check_shared(run, peers)
            return _evaluate(settings, run, rows, device)


def _evaluate(settings: Recipe, run: Path, rows: Sequence[str], device: torch.device) -> dict[str, Scores]:
    evaluation = settings.tracking.evaluation
    assert evaluation is not None
    asked: dict[str, Any] = {**teachers(settings, rows), **agreed(lambda: students(settings, run, rows))}
    real = evaluation.has_pictures and "real" in rows
    if not (asked or real):
        raise UserError("--rows", f"{run} has no pictures for {', '.join(rows)}; give other rows")
    family = load_family(settings)
    open_decoder(settings, family)
    family.to(device)
    networks = Networks(settings, family, device)
    with tqdm(disable=dist.get_rank() != 0, unit="batch", desc="evaluate") as bar:
        finished = FinishedBatches(run / FOLDER / "batches", agreed(lambda: depends(settings)))
        evaluator = open_evaluator(settings, family, device, finished=finished, progress=bar.update)
        measures: dict[str, Callable[[], Scores]] = {}
        if real:
            measures["real"] = evaluator.real
        for key, (name, plan, checkpoint, own) in asked.items():
            source = Source(key, partial(networks.draw, evaluator, plan, checkpoint), own)
            measures[key] = partial(evaluator.source, name, source)
        shares = -(-len(evaluator.batches) // dist.get_world_size())
        bar.total = shares * (len(measures) + evaluation.has_pictures)
        scores: dict[str, Scores] = {}
        for key, measure in measures.items():
            scores[key] = found = measure()
            say(bar, broken(found, evaluator.count, evaluator.reference.prompts))
            if dist.get_rank() == 0:
                write(run / FOLDER, scores, settings)
    if failure := said_anywhere(evaluator.failure):
        say(bar, f"warning: {failure}; its scores are NaN")
    return scores


class Networks:
    """The networks of a run, one in memory at a time, and none before it has to draw.

    Batches that an earlier evaluation has measured need no network.
    """

    def __init__(self, settings: Recipe, family: Family, device: torch.device) -> None:
        self.settings, self.family, self.device = settings, family, device
        self.role = ""
        self.network: nn.Module | None = None
        self.loaded: Path | None = None

    def draw(self, evaluator: Any, plan: SamplingPlan, checkpoint: Path | None, index: range) -> torch.Tensor:
        """Draw pictures of the teacher, or of the student of a checkpoint."""
        return evaluator.sampled(self.open(checkpoint), plan, index)

    def open(self, checkpoint: Path | None) -> nn.Module:
        """The teacher, or the student of a checkpoint, in the precision of the training."""
        settings, family, role = self.settings, self.family, "teacher" if checkpoint is None else "student"
        if self.network is None or self.role != role:
            self.network = None  # before the next is loaded
            network = load_network(settings.model, family) if role == "teacher" else make_generator(settings, family)
            # diffusers' own `to` warns of layers to keep in float32, where none are.
            self.network = nn.Module.to(network.eval(), self.device, DTYPES[settings.optim.precision])
            self.role, self.loaded = role, None
        if checkpoint is not None and self.loaded != checkpoint:
            load_weights("run", checkpoint / STUDENT, self.network)
            self.loaded = checkpoint
        return self.network


Row = tuple[str, SamplingPlan, Path | None, Any]
"""A name for people, the sampling, the checkpoint (None for the teacher), and what the pictures depend on."""


def teachers(settings: Recipe, rows: Sequence[str]) -> dict[str, Row]:
    """The rows of the teacher, by key: one for each number of steps."""
    evaluation = settings.tracking.evaluation
    assert evaluation is not None
    found: dict[str, Row] = {}
    for steps in evaluation.teacher_steps if "teacher" in rows else []:
        plan = teacher_plan(settings, steps)
        found[f"teacher-{steps}"] = teacher_name(settings, steps), plan, None, asdict(plan)
    return found


def students(settings: Recipe, run: Path, rows: Sequence[str]) -> dict[str, Row]:
    """The rows of the checkpoints and of the student, by key; the student is that of the newest checkpoint.

    Raises:
        UserError: the weights of a student are damaged.
    """
    if not {"checkpoints", "student"} & set(rows):
        return {}
    plan, last = student_plan(settings), newest("run", str(run))
    earlier = [path for path in checkpoints_in(run / "checkpoints") if step_of(path) < step_of(last)]
    chosen = [*(earlier if "checkpoints" in rows else []), *([last] if "student" in rows else [])]
    found: dict[str, Row] = {}
    for path in chosen:
        weights = fingerprint(path / STUDENT)
        if read_manifest("run", path)["files"].get(STUDENT) != weights:
            raise UserError("run", f"{path / STUDENT} is damaged; give another checkpoint")
        step = step_of(path)
        key = "student" if path == last else f"step-{step}"
        found[key] = f"student at step {step}, {counted(plan.steps)}", plan, path, [asdict(plan), weights]
    return found


def depends(settings: Recipe) -> dict[str, Any]:
    """What the measurements of all rows depend on, besides sampling and checkpoint."""
    evaluation = settings.tracking.evaluation
    assert evaluation is not None
    inputs = {k: v for k, v in fingerprints(settings).items() if k.startswith(("model", "tracking", "data.embeddings"))}
    rewards = [
        (r.name, r.precision, contents(r.options), r.checkpoint and content_fingerprint(r.checkpoint))
        for r in [*scored_by(settings).values(), *([evaluation.features] if evaluation.features else [])]
    ]
    model = settings.model.model_dump(include={"family", "resolution", "max_tokens", "generator_lora"}, mode="json")
    strengths = [lora.strength for lora in settings.model.teacher_loras]
    free = {"classifier", "features", "rewards", "prompt_files", "teacher_steps", "every"}
    drawn = evaluation.model_dump(exclude={*free, "reference"}, mode="json")
    if not evaluation.has_pictures or evaluation.reference in ("shapes", "scenes"):
        drawn["reference"] = evaluation.reference
    memory = settings.memory.model_dump(include={"vae_tiling"})
    more = [settings.optim.precision, settings.guidance.unconditional, strengths, memory]
    return {"inputs": inputs, "rewards": rewards, "model": model, "drawn": drawn, "more": more}


def contents(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a reward, with fingerprints of the files and folders that they name."""
    files = {name: value for name, value in options.items() if isinstance(value, str) and os.path.exists(value)}
    return options | {name: content_fingerprint(value) for name, value in files.items()}


def broken(scores: Scores, count: int, prompts: Callable[[range], list[Any]]) -> str:
    """A line on pictures that are not finite, the first three by number and prompt; empty if there are none."""
    if not scores.broken:
        return ""
    named = ", ".join(f"{i} ({prompts(range(i, i + 1))[0]!r})" for i in scores.broken[:3])
    more = f" and {len(scores.broken) - 3} more" if len(scores.broken) > 3 else ""
    return (
        f"warning: {scores.name}: {len(scores.broken)} of {count} pictures are not finite: {named}{more}; "
        f"no score counts them"
    )


def write(folder: Path, scores: dict[str, Scores], settings: Recipe) -> None:
    """Write recipe.yaml, which tells what was measured, evaluation.json and evaluation.md."""
    recipe = dump_recipe(settings)
    write_whole(folder / RECIPE, lambda path: path.write_text(recipe, encoding="utf-8"))
    save_scores(folder, scores)
    write_whole(folder / "evaluation.md", lambda path: path.write_text(f"{markdown_table(scores)}\n", encoding="utf-8"))


def say(bar: Any, text: str) -> None:
    """Print a line beside the bar, on rank 0."""
    if text and dist.get_rank() == 0:
        bar.write(text, file=sys.stderr)
