"""What Python callers use, and what the command line is a thin layer over. Imports no torch until something runs.

    import dmdr_train

    recipe = dmdr_train.load_recipe("demo", "run.steps=100")
    student = dmdr_train.train(recipe)

A mistake of the user raises `UserError`, whose text names the key, the value and the fix. A run that ends early raises
`StoppedError`. Under a launcher, every process makes the same calls.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from dmdr_models.folder.checks import STATE_DICTS

from dmdr_train.base.errors import UserError
from dmdr_train.base.folders import check_writable
from dmdr_train.checkpoint.find import newest_verified
from dmdr_train.checkpoint.manifest import RECIPE
from dmdr_train.distributed.device_name import name_device
from dmdr_train.evaluation.scores import Scores, all_scores
from dmdr_train.recipe import load
from dmdr_train.recipe.schema import Recipe
from dmdr_train.run import preflight
from dmdr_train.tracking.tracker import Tracker

LAYOUTS = ("diffusers", "original")
"""The names that the weights in an exported file may have."""
ROWS = ("real", "teacher", "checkpoints", "student")
"""What an evaluation may score."""
EVALUATION_KEYS = ("tracking.evaluation", "guidance.teacher_cfg", "run.device", "run.timeout", "data.embeddings")
"""The keys of a run's recipe that an evaluation may set anew."""


def load_recipe(config: str | Path, *overrides: str) -> Recipe:
    """Read a recipe file, or a built-in recipe by its name.

    Args:
        overrides: `key=value` texts, such as "optim.generator.lr=1e-5", which win over the file.

    Raises:
        UserError: for the first key or value that is not valid.
    """
    return load.load_recipe(str(config), overrides)


def check(recipe: Recipe) -> None:
    """Check everything that can be known before a model is loaded: files, folders, rewards, batch size, output.

    Raises:
        UserError: for the first thing that cannot work.
    """
    preflight.check(recipe, int(os.environ.get("WORLD_SIZE", "1")))


def train(recipe: Recipe, callbacks: Sequence[Tracker] = ()) -> Path:
    """Check a recipe and carry it out, from the start or from its checkpoint as `run.resume` says.

    Args:
        callbacks: objects that receive every row of the log, every sample sheet and every checkpoint; see `Tracker`.
            They are called on the first process.

    Returns:
        The folder of the exported student, which `dmdr-generate` and stock diffusers open.

    Raises:
        UserError: the recipe cannot be carried out.
        StoppedError: the run ended before its last step, and its state is saved.
    """
    check(recipe)
    name_device(recipe.run.device)
    from dmdr_train.run import runner

    runner.run(recipe, callbacks)
    return Path(recipe.run.output) / "student"


def dry_run(recipe: Recipe) -> dict[str, float]:
    """Check a recipe, build everything, and take the first step of every stage; nothing is written.

    Returns:
        The values that these steps log.

    Raises:
        UserError: the recipe cannot be carried out.
    """
    preflight.check(recipe, int(os.environ.get("WORLD_SIZE", "1")), dry_run=True)
    name_device(recipe.run.device)
    from dmdr_train.run import runner

    return runner.dry_run(recipe)


def evaluate(run: str | Path, *overrides: str, rows: Sequence[str] = ROWS) -> dict[str, Scores]:
    """Score teacher, checkpoints and student of a run, on its recipe's device, by its recipe's evaluation.

    The measurements of every batch of pictures are kept in RUN/evaluation. A second call does only what is missing.

    Args:
        run: the folder of the run.
        overrides: `key=value` texts for keys of `EVALUATION_KEYS`, which win over the run's recipe.
        rows: which of `ROWS`.

    Returns:
        The scores by row: `real`, `teacher-STEPS`, `step-STEP` for each checkpoint before the newest, and `student`.

    Raises:
        UserError: the folder holds no run, there is no evaluation, or it cannot be carried out.
    """
    settings = open_run(run, overrides)
    if settings.tracking.evaluation is None:
        example = "'tracking.evaluation={prompt_files: FILE, rewards: [{name: NAME, checkpoint: FILE}]}'"
        raise UserError("tracking.evaluation", f"is not set in {Path(run) / RECIPE}; give it here, such as {example}")
    preflight.check_evaluation(settings, preflight.read_description(settings))
    if {"checkpoints", "student"} & set(rows):  # the teacher needs none
        newest_verified("run", str(run))
    check_writable("run", Path(run))
    name_device(settings.run.device)
    from dmdr_train.run.evaluate_run import evaluate_run

    return evaluate_run(settings, Path(run), rows)


def export(run: str | Path, output: str | Path, layout: str = "diffusers") -> Path:
    """Write the student of a run's newest checkpoint.

    Args:
        run: the folder of the run.
        output: a new folder; or a file that ends in .safetensors, .bin, .pt or .pth, for a state dict.
        layout: names of the weights in a file, "diffusers" or "original": those of the model's authors, which ComfyUI
            and kohya's scripts read.

    Returns:
        The checkpoint that the student is from.

    Raises:
        UserError: the folder holds no run, the output exists or cannot be written to, or it cannot have this layout.
    """
    settings, output = open_run(run), Path(output)
    if layout not in LAYOUTS:
        raise UserError("--layout", f"{layout} is unknown; give one of {', '.join(LAYOUTS)}")
    if layout == "original" and output.suffix != ".safetensors":
        raise UserError("--layout", "original is for a file; give --output a name that ends in .safetensors")
    if output.exists():
        raise UserError("--output", f"{output} already exists; give a new folder or file")
    check_writable("--output", output.parent)
    from dmdr_train.reporting.student_export import check_original, export_state_dict, export_student

    if layout == "original":
        check_original(settings)
    source = newest_verified("run", str(run))
    if output.suffix in STATE_DICTS:
        export_state_dict(output, settings, source, layout == "original")
    else:
        export_student(output, settings, source, next(iter(all_scores(Path(run)).values()), {}))
    return source


def open_run(run: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run.

    Args:
        overrides: `key=value` texts for keys of `EVALUATION_KEYS`.

    Raises:
        UserError: the folder holds no run, or an override is for another key.
    """
    path = Path(run) / RECIPE
    if not path.is_file():
        raise UserError("run", f"{run} holds no {RECIPE}; give the folder of a run")
    data = load.read_yaml(path)
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == each or key.startswith(f"{each}.") for each in EVALUATION_KEYS):
            raise UserError(key, f"belongs to the run's training and stays; give {', '.join(EVALUATION_KEYS)}")
        load.apply_override(data, override)
    return load.parse_recipe(data)
