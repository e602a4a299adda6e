"""Trackers by name: TensorBoard, Weights & Biases, and the trackers of installed packages.

A package adds a tracker by declaring it in its pyproject.toml:

    [project.entry-points.dmdr_trackers]
    my_tracker = "my_package:MyTracker"

A recipe names it with its options: `tracking: {trackers: {my_tracker: {url: …}}}`. The built-in trackers register in
the same way; `tracking.tensorboard` and `tracking.wandb` are short for them.

The entry point is a factory, such as a class. It is called as `factory(folder, recipe, start, **options)`: the run's
folder, the whole recipe, and the step that the run starts from, which is above 0 after a resume. It returns a
`Tracker`. If the factory has an attribute `Options`, a pydantic model, the options of the recipe are validated by it
before the training starts, and its defaults are passed, too. Its module is imported then, without torch; import slow
packages inside the factory.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmdr_train.base.errors import UserError
from dmdr_train.base.plugins import Plugins, nearest_name
from dmdr_train.recipe.schema import Recipe, Tracking
from dmdr_train.tracking.tracker import Tracker

TRACKERS = Plugins("dmdr_trackers", "tracker")


@dataclass(frozen=True)
class Choice:
    """A tracker that a recipe names.

    Args:
        key: the recipe key that names it, for errors.
        name: of its entry point.
        options: as the recipe gives them.
    """

    key: str
    name: str
    options: Mapping[str, Any]

    def check(self) -> None:
        """Check name and options.

        Raises:
            UserError: the tracker is unknown or cannot be imported, or an option is wrong.
        """
        checked_options(self.key, self._factory(), self.options)

    def open(self, folder: Path, recipe: Recipe, start: int) -> Tracker:
        """Make the tracker.

        Raises:
            UserError: as `check` does.
        """
        factory = self._factory()
        return factory(folder, recipe, start, **checked_options(self.key, factory, self.options))

    def _factory(self) -> Callable[..., Tracker]:
        try:
            return TRACKERS.load(self.name)
        except ValueError as error:
            raise UserError(self.key, str(error)) from None


def chosen(tracking: Tracking) -> list[Choice]:
    """The trackers that a recipe's section `tracking` names.

    Raises:
        UserError: a tracker is named twice.
    """
    short = [Choice("tracking.tensorboard", "tensorboard", {})] if tracking.tensorboard else []
    if tracking.wandb is not None:
        short.append(Choice("tracking.wandb", "wandb", {"project": tracking.wandb}))
    for choice in short:
        if choice.name in tracking.trackers:
            fix = f"set it to {'false' if choice.name == 'tensorboard' else 'null'}"
            raise UserError(choice.key, f"and tracking.trackers.{choice.name} name the same tracker; {fix}")
    return [*short, *(Choice(f"tracking.trackers.{name}", name, given) for name, given in tracking.trackers.items())]


def checked_options(key: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a factory is called with: validated by its `Options`, if it has that attribute.

    Args:
        key: the recipe key of the tracker.

    Raises:
        UserError: for the first option that is unknown, missing or wrong.
    """
    model = getattr(factory, "Options", None)
    parameters = list(inspect.signature(factory).parameters.values())[3:]  # after folder, recipe and start
    valid = [parameter.name for parameter in parameters] if model is None else list(model.model_fields)
    anything = model is None and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    for name in options:
        if name not in valid and not anything:
            hint = nearest_name(name, valid) if valid else "this tracker has no options"
            raise UserError(f"{key}.{name}", f"unknown key; {hint}")
    if model is None:
        for parameter in parameters:
            needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if needed and parameter.name not in options:
                raise UserError(f"{key}.{parameter.name}", "is required; add it to the recipe")
        return dict(options)
    try:
        return dict(model.model_validate(dict(options)))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join([key, *map(str, problem["loc"])])
        if problem["type"] == "missing":
            raise UserError(place, "is required; add it to the recipe") from None
        if problem["type"] == "value_error":
            raise UserError(place, str(problem["ctx"]["error"])) from None
        message = problem["msg"].replace("Input should", "should", 1)
        raise UserError(place, f"{message}, got {problem['input']!r}") from None
