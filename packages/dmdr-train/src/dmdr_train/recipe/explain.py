"""One clear line for what pydantic finds wrong in a recipe: the key, the value, and the nearest key that is right."""

import difflib
from typing import Any

from pydantic import BaseModel

from dmdr_train.base.errors import UserError
from dmdr_train.recipe.objective_kinds import section_class
from dmdr_train.recipe.schema import Recipe

BRANCHES = (
    "reward_hacking", "limit", "latent_mse", "lpips", "constrained-float", "float", "literal['auto']", "literal['all']",
    "side", "size", "sizes", "choice", "parts", "true_or_false", "list_of_rewards",
)  # fmt: skip
"""What pydantic adds to the place of a mistake: the branches of unions."""


def explain(problem: Any, data: Any) -> UserError:
    """The error for one of a ValidationError's `errors()`.

    Args:
        data: the recipe that was validated.
    """
    *inner, last = problem["loc"] or [""]
    loc = [str(part) for part in inner if part not in BRANCHES]
    loc += [str(last)] if last not in BRANCHES or problem["type"] == "extra_forbidden" else []
    key = ".".join(loc)
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
        name, _, message = text.partition(": ")
        return UserError(key, text) if key else UserError(name, message)  # checks of the whole recipe name the key
    if problem["type"] == "extra_forbidden":
        valid = _keys_at(loc[:-1], data)
        near = difflib.get_close_matches(loc[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*loc[:-1], near[0]])}?" if near else f"valid are {', '.join(valid)}"
        return UserError(key, f"unknown key; {hint}")
    if problem["type"] == "missing":
        return UserError(key, "is required; add it to the recipe or give key=value")
    message = problem["msg"].replace("Input should", "should", 1)
    if problem["type"] in ("model_type", "dict_type", "model_attributes_type"):
        message = "should be a section of keys and values, as in {key: value}"
    if problem["type"] == "union_tag_invalid":
        message = f"kind must be one of {problem['ctx']['expected_tags']}"
    return UserError(key, f"{message}, got {_short(problem['input'])}")


def is_number(text: str) -> bool:
    """Whether a text is digits, and those that `int` reads."""
    return text.isascii() and text.isdigit()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."


def _keys_at(loc: list[str], data: Any) -> list[str]:
    """The valid keys of the section at `loc`."""
    models: list[type[BaseModel]] = [Recipe]
    if loc[:1] == ["objectives"] and len(loc) > 1:
        models, loc = [section_class(data["objectives"][int(loc[1])]["kind"])], loc[2:]
    for part in loc:
        if is_number(part):
            continue
        models = [
            m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)
        ]
    return sorted({key for model in models for key in model.model_fields})


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models(part)]
