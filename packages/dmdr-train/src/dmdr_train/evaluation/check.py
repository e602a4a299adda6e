"""Checks of `tracking.evaluation` against its files, before anything is drawn. Imports no torch."""

import os
from pathlib import Path

from dmdr_models import registry
from dmdr_models.base.picture_size import size_text
from dmdr_models.folder.contents import Description
from dmdr_rewards.score.archives import PICTURES as PICTURES_OF_NPZ
from dmdr_rewards.score.archives import arrays_in, from_npz
from dmdr_rewards.score.sources import ENDINGS

from dmdr_train.base.errors import UserError, naming
from dmdr_train.data.picture_folder import class_folders, pictures_in
from dmdr_train.data.prompt_sets import KEY, read_prompt_sets
from dmdr_train.recipe.schema import DRAWN, Evaluation, Recipe

REFERENCE = "tracking.evaluation.reference"


def check_evaluation(settings: Recipe, found: Description | None) -> None:
    """Check that the classifier, the reference and the prompts are there, and go with the model.

    Args:
        found: what the model's folder holds; None for a hub name.

    Raises:
        UserError: for the first mistake.
    """
    evaluation = settings.tracking.evaluation
    if evaluation is None:
        return
    texts = registry.find(settings.model.family).takes == "texts"
    if evaluation.classifier is not None and not os.path.isdir(evaluation.classifier):
        fix = "give one that exists"
        raise UserError("tracking.evaluation.classifier", f"no folder {evaluation.classifier!r}; {fix}")
    compared = evaluation.reference is not None or evaluation.per_prompt > 1
    if evaluation.classifier is not None and texts and (evaluation.features is not None or not compared):
        cause = "beside features" if compared else "without a reference"
        raise UserError(
            "tracking.evaluation.classifier", f"has no effect {cause}, since the prompts are texts; leave it out"
        )
    if evaluation.reference in DRAWN and (evaluation.reference == "scenes") != texts:
        takes, fix = ("texts", "scenes, or a folder of") if texts else ("class labels", "shapes, or a folder of")
        message = f"{evaluation.reference} does not go with a model that takes {takes}; use {fix} pictures"
        raise UserError(REFERENCE, message)
    sizes = settings.model.sizes
    if evaluation.reference == "scenes" and sizes and sizes[0].shape != (32, 32):
        raise UserError(
            REFERENCE,
            f"scenes are 32 pixels high and wide, and model.resolution starts with "
            f"{size_text(sizes[0].shape)}; leave tracking.evaluation out",
        )
    if evaluation.prompt_files and not texts:
        raise UserError(KEY, f"family {settings.model.family} takes class labels, which come in turn; remove them")
    if texts and not evaluation.prompt_files and evaluation.reference not in DRAWN:
        raise UserError(KEY, f"is empty and family {settings.model.family} takes texts; give files of held-out prompts")
    count = evaluation.pictures
    if evaluation.prompt_files:
        prompts = sum(map(len, read_prompt_sets(evaluation.prompt_files).values()))
        count = min(prompts, count // evaluation.per_prompt) * evaluation.per_prompt
    check_reference(evaluation, count, texts, None if found is None else found.num_classes)


def check_reference(evaluation: Evaluation, count: int, texts: bool, num_classes: int | None) -> None:
    """Check that the reference has files enough to take each once: as the reference set, and as real pictures.

    Args:
        count: of the evaluation's pictures.
        num_classes: of the model; None if it is unknown.
    """
    path = evaluation.reference
    if path is None or path in DRAWN:
        return
    if evaluation.is_npz:
        check_npz(Path(path))
        return
    if not os.path.isdir(path):
        raise UserError(REFERENCE, f"no folder {path!r}; give one that exists")
    if texts:
        check_files(Path(path), 2 * count, count, len(pictures_in(Path(path))) // 2)
        return
    classes = class_folders(Path(path))
    if num_classes is not None and len(classes) != num_classes:
        raise UserError(REFERENCE, f"{path} has {len(classes)} sub-folders; give one for each of {num_classes} classes")
    if not classes:
        raise UserError(REFERENCE, f"{path} has no sub-folder; give one with pictures for each class")
    most = len(classes) * min(len(pictures_in(each)) // 2 for each in classes)
    for label, each in enumerate(classes):
        check_files(each, 2 * len(range(label, count, len(classes))), count, most)


def check_npz(path: Path) -> None:
    """Check that a file holds statistics, or pictures that can be read from their places."""
    if not path.is_file():
        raise UserError(REFERENCE, f"no file {str(path)!r}; give one that exists")
    with naming(REFERENCE):
        held = arrays_in(path)
        if PICTURES_OF_NPZ in held:
            from_npz(path)
        elif not {"mu", "sigma"} <= held:
            raise ValueError(
                f"{path} has neither mu and sigma nor {PICTURES_OF_NPZ}; give one of ADM's reference batches"
            )


def check_files(folder: Path, needed: int, count: int, most: int) -> None:
    """Check that a folder has as many pictures as are needed, since none is taken twice.

    Args:
        count: of the evaluation's pictures, and `most` how many the reference is enough for.
    """
    here = len(pictures_in(folder))
    if not here:
        raise UserError(REFERENCE, f"{folder} holds no picture; put some there ({', '.join(sorted(ENDINGS))})")
    if here < needed:
        fewer = f", or set tracking.evaluation.pictures to {most} or less" if most >= 100 else ""
        raise UserError(
            REFERENCE,
            f"{folder} has {here} pictures and {count} evaluated pictures need {needed} of them, half as reference and "
            f"half as real pictures; add some{fewer}",
        )
