"""The folder of a run, opened by the commands that go on with it."""

from pathlib import Path

from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.manifest import RECIPE
from dmdr_train.recipe.load import parse_recipe, read_yaml
from dmdr_train.recipe.schema import Recipe


def open_run(folder: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        UserError: the folder holds no run.
    """
    if not (folder / RECIPE).is_file():
        raise UserError("run", f"{folder} holds no {RECIPE}; give the folder of a run")
    return parse_recipe(read_yaml(folder / RECIPE))
