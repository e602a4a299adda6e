"""What can be known to be wrong before torch is imported or a weight is read."""

import difflib
import importlib.util
import tempfile
from pathlib import Path

from dmdr_models.describe import Description, describe

from dmdr_train.errors import UserError
from dmdr_train.recipe import Recipe, Reward

RUN_FILE = "recipe.yaml"
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


def pictures_in(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)


def check(settings: Recipe, world: int, dry_run: bool = False) -> None:
    """Check a recipe against the files it names and the processes it runs on.

    Raises:
        UserError: for the first thing that cannot work.
    """
    check_batch(settings, world)
    found = check_model(settings)
    for i, objective in enumerate(settings.objectives):
        if objective.kind != "distribution_matching":
            check_reward(f"objectives.{i}.reward", objective.reward)
    evaluation = settings.tracking.evaluation
    if evaluation:
        folder("tracking.evaluation.classifier", evaluation.classifier)
        if evaluation.reference != "shapes":
            check_reference("tracking.evaluation.reference", evaluation.reference, found)
    if settings.run.init_from:
        folder("run.init_from", settings.run.init_from)
    if settings.tracking.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UserError("tracking.wandb", "wandb is not installed; pip install dmdr-train[wandb], or set it to null")
    if not dry_run:
        check_output(settings)


def check_batch(settings: Recipe, world: int) -> None:
    optim = settings.optim
    if optim.batch_size % (world * optim.accumulation):
        unit = world * optim.accumulation
        raise UserError(
            "optim.batch_size",
            f"{optim.batch_size} cannot be split over {world} processes x optim.accumulation {optim.accumulation}; "
            f"use a multiple of {unit}, such as {-(-optim.batch_size // unit) * unit}",
        )


def check_model(settings: Recipe) -> Description | None:
    """Check the section `model` and the classes of `data`; None for a hub name, which only loading can check."""
    model = settings.model
    found = read_description("model.path", model.path, model.family, model.vae is not None)
    if model.vae is not None and Path(model.vae).is_absolute():
        folder("model.vae", model.vae)
    if model.generator is not None:
        folder("model.generator", model.generator)
    if found is None:
        return None
    for key, lora in (("generator_lora", model.generator_lora), ("fake_score_lora", model.fake_score_lora)):
        if lora is not None:
            check_targets(f"model.{key}.targets", lora.targets or [], found)
    classes = settings.data.classes
    if classes != "all":
        if not classes:
            raise UserError("data.classes", "is empty; give class labels, or all")
        for label in classes:
            if not 0 <= label < found.num_classes:
                raise UserError(
                    "data.classes", f"label {label} is out of range; valid are 0 to {found.num_classes - 1}"
                )
    return found


def read_description(key: str, path: str, family: str, own_vae: bool) -> Description | None:
    try:
        return describe(family, path, own_vae)
    except (OSError, ValueError) as error:
        raise UserError(key, f"{error}; give a folder that holds a {family} model") from None


def check_targets(key: str, targets: list[str], found: Description) -> None:
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in found.layers):
            valid = sorted({name.rpartition(".")[2] for name in found.layers})
            near = difflib.get_close_matches(target, valid, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(valid)}"
            raise UserError(key, f"{target!r} matches no layer of the network; {hint}")


def check_reward(key: str, reward: Reward) -> None:
    if not Path(reward.checkpoint).exists():
        raise UserError(f"{key}.checkpoint", f"no file or folder {reward.checkpoint!r}; give the reward's weights")


def check_reference(key: str, path: str, found: Description | None) -> None:
    """A reference folder holds a sub-folder with pictures for every class."""
    folder(key, path)
    classes = sorted(p for p in Path(path).iterdir() if p.is_dir())
    if found is not None and len(classes) != found.num_classes:
        raise UserError(key, f"{path} has {len(classes)} sub-folders; give one for each of {found.num_classes} classes")
    for each in classes:
        if not pictures_in(each):
            raise UserError(key, f"{each} holds no picture; put some there ({', '.join(sorted(PICTURES))})")


def folder(key: str, path: str) -> None:
    if not Path(path).is_dir():
        raise UserError(key, f"no folder {path!r}; give one that exists")


def check_output(settings: Recipe) -> None:
    """The output folder can be written, and holds no run but the one to go on with."""
    output = Path(settings.run.output)
    if settings.run.resume == "never" and (output / RUN_FILE).exists():
        raise UserError(
            "run.output",
            f"{output} already holds a run; give another folder, or run.resume=auto to go on with it",
        )
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError("run.output", f"{existing} is a file; give a folder")
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # asks the file system, which permissions do not tell all
    except OSError as error:
        raise UserError(
            "run.output", f"{existing} cannot be written to ({error.strerror}); give another folder"
        ) from None
