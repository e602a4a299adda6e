"""Scoring the student of a checkpoint again, on one process."""

from pathlib import Path

import torch

from dmdr_train.checkpoint.load import load_weights
from dmdr_train.checkpoint.manifest import STUDENT
from dmdr_train.distributed.process_group import processes
from dmdr_train.evaluation.evaluator import Evaluator
from dmdr_train.evaluation.scores import Scores
from dmdr_train.evaluation.seeded_sampling import student_plan
from dmdr_train.recipe.schema import Recipe
from dmdr_train.training.networks import load_family, make_generator, open_decoder


def evaluate_student(settings: Recipe, checkpoint: Path) -> Scores:
    """Score the averaged student of a checkpoint by the recipe's evaluation, which must be set."""
    assert settings.tracking.evaluation is not None
    with processes(torch.device("cpu")):
        family = load_family(settings)
        open_decoder(settings, family)
        network = make_generator(settings, family)
        load_weights("run", checkpoint / STUDENT, network)
        evaluator = Evaluator(settings.tracking.evaluation, family, torch.device("cpu"))
        return evaluator.model("student", network, student_plan(settings))
