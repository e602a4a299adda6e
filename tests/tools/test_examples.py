"""Every example of the manual: Python runs, commands can be typed, keys and recipes are valid, files are there."""

import argparse
import importlib
import re
import runpy
import sys
from pathlib import Path
from typing import Any, get_args, get_origin
from unittest import mock

import dmdr_rewards
import dmdr_train
import manual_examples as examples
import pytest
import tomllib
import torch
from dmdr_models import generate
from dmdr_rewards import cli as scoring
from dmdr_rewards.compare.feature_names import FIRST
from dmdr_rewards.score.reward_arguments import parse_rewards
from dmdr_train import cli
from dmdr_train.recipe.load import find_recipe, from_yaml, load_recipe, parse_recipe, read_yaml, resolve_paths
from dmdr_train.recipe.objective_kinds import OBJECTIVES
from dmdr_train.recipe.schema import ObjectiveSection, Recipe
from dmdr_train.training.discriminator import Discriminator
from dmdr_train.training.guide import Guide
from pydantic import BaseModel

PYTHON_RUN_BY = {
    "docs/extending.md": "tests/plugins/test_documents.py",
    "docs/sd3.md": "tests/models/test_documents.py",
    "docs/sdxl.md": "tests/models/test_documents.py",
    "docs/sit.md": "tests/models/test_documents.py",
    "packages/dmdr-core/README.md": "tests/core/test_readme.py",
    "packages/dmdr-models/README.md": "tests/models/test_documents.py",
    "packages/dmdr-rewards/README.md": "tests/rewards/test_readme.py",
}
"""The pages whose Python another test runs, on tiny models."""
RECIPES = {
    "docs/objectives/divergences.md": "demo",
    "docs/objectives/regression.md": "demo",
    "docs/first_model.md": "sd3-medium-cold-start",
    "docs/sd3.md": "sd35-large-cold-start",
    "docs/sdxl.md": "sdxl-4step",
    "docs/training.md": "sd35-large-cold-start",
}
"""The recipes to which a page's keys and parts of recipes are added; `demo-t2i` for all other pages."""
PLACES = {"rules": "watch", "rewards": "watch", "features": "tracking.evaluation"}
"""Where a part of a recipe belongs that begins with one of these keys."""


class Parsed(BaseException):
    """Ends a program of which only the arguments are to be read. No program catches it."""


@pytest.fixture
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs end as soon as they have read their arguments."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self: Any, arguments: Any = None, namespace: Any = None, original: Any = original) -> None:
            given = list(sys.argv[1:] if arguments is None else arguments)
            if "only the parser" in given:
                raise Parsed(self)
            raise Parsed(original(self, given, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def start(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a program of ours in this process."""
    mains = {
        "dmdr-train": cli.main,
        "dmdr_train": cli.main,
        "packages/dmdr-train/run.py": cli.run_main,
        "dmdr-generate": generate.main,
        "dmdr-score": scoring.main,
    }
    if program in mains:
        mains[program](arguments)
    elif program.startswith("tools/"):
        assert program == "tools/bench" or "parse_args" in (examples.ROOT / program).read_text(encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        runpy.run_path(str(examples.ROOT / program), run_name="__main__")
    else:
        importlib.import_module(program).main(arguments)


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a program reads from its arguments, or its parser if one of them is "only the parser"."""
    program, *arguments = words[1:] if words[0] == "-m" else words
    with pytest.raises(Parsed) as end:
        start(program, arguments, monkeypatch)
    return end.value.args[0]


def check(words: list[str], monkeypatch: pytest.MonkeyPatch, base: str = "demo-t2i") -> None:
    """Read the arguments of a command; then the recipe with its overrides, and the names of rewards and features.

    Args:
        base: the recipe that takes the place of the reader's own.
    """
    options = vars(parsed(words, monkeypatch))
    recipe = options.get("config") or options.get("recipe")
    if "overrides" in options and not words[0].startswith("tools/"):
        classes = any("labels:" in override for override in options["overrides"])
        own = recipe is None or recipe.endswith(".yaml")
        load_recipe(("demo" if classes else base) if own else recipe, options["overrides"])
    if words[0] == "dmdr-score":
        rewards = parse_rewards(options.get("reward") or [], options["option"] if options.get("reward") else [])
        for name in [each.reward for each in rewards] + ([options["name"]] if "name" in options else []):
            dmdr_rewards.describe(name)
        for name in [each.partition("=")[0] for each in options.get("features") or []]:
            assert name in FIRST or dmdr_rewards.describe(name)


def flags(parser: argparse.ArgumentParser, words: list[str]) -> set[str]:
    """The options of a program, and of its command that the words name."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            name = next((word for word in words if not word.startswith("-")), None)
            if name is not None:
                assert name in action.choices
                found |= flags(action.choices[name], words[words.index(name) + 1 :])
    return found


@pytest.mark.usefixtures("stop_after_parsing")
@pytest.mark.parametrize("page", [page for page in examples.PAGES if examples.commands(page)])
def test_commands_can_be_typed(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in examples.commands(page):
        check(words, monkeypatch, RECIPES.get(page, "demo-t2i"))


@pytest.mark.usefixtures("stop_after_parsing")
@pytest.mark.parametrize("page", [page for page in examples.PAGES if examples.abbreviated(page)])
def test_commands_within_lines_have_these_options(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in examples.abbreviated(page):
        program = words[: 2 if words[0] in ("-m", "tools/bench") or words[1] in ("serve", "compare") else 1]
        parser = parsed([*program, "only the parser"], monkeypatch)
        given = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-m"}
        assert given <= flags(parser, words[len(program) :]), words


@pytest.mark.usefixtures("stop_after_parsing")
@pytest.mark.parametrize(
    "words",
    [
        ["dmdr-train", "report", "runs/mine", "--no-such-option"],
        ["dmdr-train", "run", "--config", "demo-t3i"],
        ["packages/dmdr-train/run.py", "--config", "demo", "run.stepz=1"],
        ["dmdr-train", "evaluate", "runs/mine", "tracking.evaluation={picture: 1}"],
        ["dmdr-generate", "serve", "--model", "x", "--no-such-option"],
        ["dmdr-score", "pictures", "--reward", "hpsv9=file", "-o", "scores.csv"],
        ["tools/ablate.py", "no_such_study"],
    ],
)
def test_a_command_that_cannot_be_typed_is_found(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, ValueError, pytest.fail.Exception)):
        check(words, monkeypatch)


def inner(annotation: Any) -> list[Any]:
    """The sections that a value of this type may be or hold; `dict` for a mapping of any keys."""
    if isinstance(annotation, type) and issubclass(annotation, ObjectiveSection):
        return [OBJECTIVES.load(kind).Section for kind in OBJECTIVES.names()]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is dict:
        return [dict]
    return [each for argument in get_args(annotation) for each in inner(argument)]


def is_key(path: str) -> bool:
    """Whether recipes have this key, such as `objectives.1.weight`."""
    sections, found = [Recipe], True
    for name in path.split("."):
        if dict in sections:
            return True
        if not name.isdecimal():
            fields = [section.model_fields[name] for section in sections if name in section.model_fields]
            sections, found = [each for field in fields for each in inner(field.annotation)], bool(fields)
    return found


@pytest.mark.parametrize("page", [page for page in examples.PAGES if examples.keys(page, Recipe.model_fields)])
def test_keys_are_those_of_recipes(page: str) -> None:
    assert [key for key in examples.keys(page, Recipe.model_fields) if not is_key(key)] == []


def test_a_key_of_no_recipe_is_found() -> None:
    assert is_key("objectives.1.reward.options.anything")
    assert is_key("guidance.dynamics.steps")
    assert not is_key("guidance.dynamics.stepz")
    assert not is_key("run.rank")


def merged(base: Any, part: Any) -> Any:
    """The recipe `base` with the values of `part` over its own."""
    if isinstance(base, dict) and isinstance(part, dict):
        return {**base, **{key: merged(base.get(key), value) for key, value in part.items()}}
    return part


@pytest.mark.parametrize("page", [page for page in examples.PAGES if examples.yaml_blocks(page)])
def test_parts_of_recipes_are_valid(page: str) -> None:
    if page == "docs/extending.md":
        return  # tests/plugins/test_documents.py installs the package that it needs
    recipe = find_recipe(RECIPES.get(page, "demo-t2i"))
    data = read_yaml(recipe)
    for block in examples.yaml_blocks(page):
        parts = block.splitlines() if block.startswith("features") else [block]
        for part in map(from_yaml, parts):
            for place in reversed(PLACES.get(next(iter(part)), "").split(".")):
                part = {place: part} if place else part
            data = merged(data, part)  # a later part of a page may need an earlier one
            parse_recipe(resolve_paths(data, recipe.parent))


@pytest.mark.parametrize("page", [page for page in examples.PAGES if examples.python_blocks(page)])
def test_python_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings and weights are replaced by objects that accept the calls which the real ones accept."""
    if page in PYTHON_RUN_BY:
        assert Path(page).name in (examples.ROOT / PYTHON_RUN_BY[page]).read_text(encoding="utf-8")
        return
    monkeypatch.setattr(dmdr_train, "train", mock.create_autospec(dmdr_train.train))
    create = mock.create_autospec(dmdr_rewards.create)
    create.side_effect = lambda name, **_: dmdr_rewards.describe(name) and mock.create_autospec(dmdr_rewards.Reward)()
    monkeypatch.setattr(dmdr_rewards, "create", create)
    guide = mock.create_autospec(Guide, instance=True)
    guide.discriminator = mock.create_autospec(Discriminator, instance=True)
    names: dict[str, Any] = dict.fromkeys(("images", "prompts", "sample", "x_t", "t", "condition"))
    names["guide"] = guide
    for block in examples.python_blocks(page):
        exec(block, names)


@pytest.mark.parametrize("page", [page for page in examples.PAGES if examples.files(page)])
def test_files_are_there(page: str) -> None:
    assert [name for name in examples.files(page) if not (examples.ROOT / name).exists()] == []


def test_hatch_knows_its_commands() -> None:
    project = tomllib.loads((examples.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    known = {*examples.PROGRAMS, "pip", "pip-audit"}
    for name, environment in project["tool"]["hatch"]["envs"].items():
        known |= {script if name == "default" else f"{name}:{script}" for script in environment.get("scripts", {})}
    for page, text in examples.PAGES.items():
        assert set(re.findall(r"hatch run ([\w:-]+)", text)) <= known, page


def test_the_step_of_another_method_has_gradients_where_they_belong() -> None:
    """docs/core.md, with networks of one number each."""
    (block,) = examples.python_blocks("docs/core.md")
    names: dict[str, Any] = {}
    exec(block, names)
    weights = [torch.full((), 0.5, requires_grad=True) for _ in range(3)]
    generator, fake, teacher = (lambda x, t, condition, weight=weight: weight * x + condition for weight in weights)
    condition, noise = torch.rand(4, 1, 1, 1), torch.randn(4, 3, 2, 2)

    def reward(x0: torch.Tensor) -> torch.Tensor:
        return x0.flatten(1).mean(dim=1)

    step = names["training_step"](generator, fake, teacher, reward, condition, 0 * condition, noise, 0)
    for loss, trained in zip(step, weights, strict=False):
        for weight, slope in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            assert (slope is not None and bool(slope != 0)) == (weight is trained)
