"""docs/is_it_going_well.md has every name that a run logs, and no other."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import dmdr_train
from dmdr_train.recipe.schema import Recipe

PAGE = Path(__file__).parents[2] / "docs/is_it_going_well.md"
ROOT = Path(str(dmdr_train.__file__)).parent
SOURCES = [*(ROOT / "objectives").glob("*.py"), *(ROOT / "training").glob("*.py"), ROOT / "run/runner.py"]
SOURCES += [ROOT / "monitoring/step_costs.py"]
PLAIN = ("distribution_matching.py", "runner.py", "step_costs.py")
"""Modules whose dictionaries have logged names without a slash as keys."""


def written(path: Path) -> Iterator[str]:
    """The names that a module logs: kinds such as "loss/" for f"loss/{name}", and whole names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            keys = list(node.keys)
        elif isinstance(node, ast.DictComp):
            keys = [node.key]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        for key in keys:
            if isinstance(key, ast.JoinedStr) and isinstance(key.values[0], ast.Constant):
                if re.fullmatch(r"[a-z_]+/", str(key.values[0].value)):
                    yield str(key.values[0].value)
            elif isinstance(key, ast.Constant) and isinstance(key.value, str):
                if "/" in key.value:
                    yield key.value.partition("/")[0] + "/"
                elif path.name in PLAIN:
                    yield key.value


def explained() -> set[str]:
    """The names in the first column of the page's tables."""
    found = set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            found |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return found


def test_the_page_has_the_names_that_the_sources_log() -> None:
    logged = {name for path in SOURCES for name in written(path)}
    assert {"loss/", "lr/", "memory", "seconds_per_step", "teacher_scale"} <= logged
    page = {name for name in explained() if not name.startswith("watch/")}
    assert {re.sub("/.*", "/", name) for name in page} == logged


def test_the_page_has_the_names_of_early_warning(make_recipe: Callable[..., Recipe]) -> None:
    reward = {"name": "class-label", "checkpoint": "classifier"}
    objectives = [{"kind": "distribution_matching"}, {"kind": "refl", "reward": reward}]
    watched = make_recipe(objectives=objectives, watch={"rewards": [reward | {"checkpoint": "b"}]}).watched
    named = {
        re.sub("(trained|past_margin|grad_norm)/.*", r"\1/OBJECTIVE", re.sub("held_out/.*", "held_out/REWARD", name))
        for name in watched
        if not name.startswith(("teacher/", "grad_norm/generator", "grad_norm/fake_score"))
    }
    page = {name.removeprefix("watch/") for name in explained() if name.startswith("watch/")}
    assert page == named | {"teacher/NAME"}
