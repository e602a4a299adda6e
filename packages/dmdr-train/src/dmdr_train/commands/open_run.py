"""Opening the folder of a run, for the commands that continue with it."""

from pathlib import Path

from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.manifest import RECIPE
from dmdr_train.recipe.load import parse_recipe, read_yaml
from dmdr_train.recipe.schema import Recipe


def open_run(folder: Path) -> Recipe:
    """Read the recipe of a run.

    Raises:
        UserError: the folder is not that of a run, or its recipe is damaged.
    """
    if not (folder / RECIPE).is_file():
        raise UserError("run", f"{folder} holds no {RECIPE}; give the folder of a run")
    return parse_recipe(read_yaml(folder / RECIPE))
