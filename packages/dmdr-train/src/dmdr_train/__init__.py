"""Distil a diffusion model to a few steps and align it with rewards: recipes, trainer, evaluation, export.

    import dmdr_train

    recipe = dmdr_train.load_recipe("demo", "run.steps=100")
    student = dmdr_train.train(recipe)

`Callback` is the base class of what `train(recipe, callbacks=[…])` calls with every row of the log, every sample sheet
and every checkpoint.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmdr_train.base.errors import StoppedError, UserError
    from dmdr_train.recipe.schema import Recipe
    from dmdr_train.run.python_api import check, evaluate, export, load_recipe, train
    from dmdr_train.tracking.tracker import Tracker as Callback

__version__ = "0.1.0"
__all__ = [
    "Callback", "Recipe", "StoppedError", "UserError", "check", "evaluate", "export", "load_recipe", "train",
]  # fmt: skip

_DOOR = "dmdr_train.run.python_api"
_HOMES = {
    "Callback": ("dmdr_train.tracking.tracker", "Tracker"),
    "Recipe": ("dmdr_train.recipe.schema", "Recipe"),
    "StoppedError": ("dmdr_train.base.errors", "StoppedError"),
    "UserError": ("dmdr_train.base.errors", "UserError"),
    **{name: (_DOOR, name) for name in ("check", "evaluate", "export", "load_recipe", "train")},
}


def __getattr__(name: str) -> Any:
    # Nothing is imported until it is used, so that `dmdr-train --help` answers at once.
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
