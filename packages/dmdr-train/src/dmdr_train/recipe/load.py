"""Reading a recipe: defaults < YAML < command line, with one clear line for every mistake.

Relative paths to inputs are looked up from the working directory, then from the recipe's own folder; `run.output`
is always relative to the working directory.
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dmdr_train.base.errors import UserError
from dmdr_train.recipe.explain import explain, is_number
from dmdr_train.recipe.schema import Recipe

MOST_VALUES, DEEPEST = 100_000, 50  # of a recipe; aliases in YAML can stand for billions
BUILT_IN = Path(__file__).parents[1] / "recipes"
INPUT_PATHS = {
    "path", "vae", "generator", "checkpoint", "classifier", "init_from", "reference", "prompts", "embeddings", "pairs",
    "pictures", "model", "start", "weights", "prompt_files",
}  # fmt: skip
INPUT_LISTS = {"prompt_files"}


def load_recipe(config: str, overrides: Sequence[str] = (), key: str = "--config") -> Recipe:
    """Read a recipe file, or a built-in recipe by name, and apply `key=value` overrides.

    Args:
        key: the option that gives `config`, for errors.

    Raises:
        UserError: for anything that is not a valid recipe.
    """
    path = find_recipe(config, key)
    data = read_yaml(path, key)
    for override in overrides:
        apply_override(data, override)
    return parse_recipe(resolve_paths(data, path.parent))


def find_recipe(config: str, key: str = "--config") -> Path:
    """The file of a recipe, or of a built-in recipe by its name.

    Args:
        key: the option that gives it, for errors.

    Raises:
        UserError: there is no such recipe.
    """
    path = Path(config)
    if os.path.isfile(path):
        return path
    names = sorted(p.stem for p in BUILT_IN.glob("*.yaml"))
    name = config.removesuffix(".yaml")
    if name in names:
        return BUILT_IN / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"give a file, or one of {', '.join(names)}"
    raise UserError(key, f"no recipe {config!r}; {hint}")


def read_yaml(path: Path, key: str = "--config") -> dict[str, Any]:
    try:
        data = from_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(key, f"{path} is not YAML text: {error}") from None
    if not isinstance(data, dict):
        raise UserError(key, f"{path} holds no sections; it must map section names to settings")
    return data


def from_yaml(text: str) -> Any:
    """The value of a YAML text: nested dicts with text as keys, lists, texts, numbers, booleans and nulls.

    Raises:
        ValueError: for anything else, such as dates, and for aliases that make the value endless or huge.
    """
    try:
        data = _Loader(text).get_single_data()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # dates and numbers are converted while reading
        raise ValueError(str(error)) from None
    nodes, seen = [(data, 0)], 0
    while nodes:
        node, depth = nodes.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ValueError("it holds too many values, or is nested too deeply")
        if isinstance(node, dict):
            if others := [key for key in node if not isinstance(key, str)]:
                raise ValueError(f"the key {others[0]!r} is no text; put it in quotes")
            nodes += [(child, depth + 1) for child in node.values()]
        elif isinstance(node, list):
            nodes += [(child, depth + 1) for child in node]
        elif node is not None and not isinstance(node, (str, int, float)):
            raise ValueError(f"{node} is a {type(node).__name__}; put it in quotes")
    return _apart(data)


def _apart(data: Any) -> Any:
    """A copy in which nothing is shared: an override of a section must not change another that is an alias of it."""
    if isinstance(data, dict):
        return {key: _apart(value) for key, value in data.items()}
    return [_apart(value) for value in data] if isinstance(data, list) else data


class _Loader(yaml.SafeLoader):
    """YAML's last of two equal keys would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def apply_override(data: dict[str, Any], override: str) -> None:
    """`optim.generator.lr=1e-5`, `objectives.1.weight=0.1`; the value is YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(override, "an override is written key=value, such as run.steps=100")
    try:
        value = from_yaml(text)
    except ValueError:
        raise UserError(key, f"{text!r} is not a YAML value; quote it") from None
    *parents, last = key.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, list):
            node = node[_index(key, part, node)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            if node is not None:
                raise UserError(key, f"{part} is a single value and has no keys below it")
            raise UserError(key, f"{part} is null here; set it whole, as in {part}={{...}}")
    if isinstance(node, list):
        node[_index(key, last, node)] = value
    else:
        node[last] = value


def _index(key: str, part: str, node: list[Any]) -> int:
    if not is_number(part) or int(part) >= len(node):
        raise UserError(key, f"{part!r} is no position in a list of {len(node)}; positions count from 0")
    return int(part)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """The single values of nested dicts and lists, by their dotted keys."""
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    else:
        return {prefix: node}
    return {k: v for name, child in items for k, v in flat(child, f"{prefix}.{name}" if prefix else str(name)).items()}


def resolve_paths(node: Any, folder: Path) -> Any:
    """The recipe `node` with the paths of inputs that exist in `folder` but not here, made absolute."""
    if isinstance(node, list):
        return [resolve_paths(item, folder) for item in node]
    if not isinstance(node, dict):
        return node
    resolved = {}
    for key, value in node.items():
        if key in INPUT_PATHS and isinstance(value, str) and not os.path.exists(value):
            beside = folder / os.path.expanduser(value)
            value = str(beside.resolve()) if os.path.exists(beside) else value
        if key in INPUT_LISTS and isinstance(value, list):
            value = [resolve_paths({"path": each}, folder)["path"] for each in value]
        resolved[key] = resolve_paths(value, folder)
    return resolved


def parse_recipe(data: dict[str, Any]) -> Recipe:
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # An unknown key first: it is often the cause of the others.
        problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise explain(problems[0], data) from None
    found = flat(recipe.model_dump())
    for key, value in flat(data).items():
        if isinstance(value, bool) and not isinstance(found.get(key), bool):  # pydantic takes true for 1
            raise UserError(key, f"should be a number, got {value}")
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
