"""Imports point one way: between the packages, and between the rooms of a package. Read from the syntax trees."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import dmdr_core
import dmdr_models
import dmdr_rewards
import dmdr_train
import pytest

ROOMS: dict[str, tuple[str, ...]] = {
    "dmdr_core": ("base",),
    "dmdr_rewards": ("base", "pictures", "prompts", "networks", "interface", "models", "judges", "score", "compare"),
    "dmdr_models": ("base", "folder", "networks", "families", "drawing", "sit", "sd3", "sdxl"),
    "dmdr_train": (
        "base", "problems", "recipe", "distributed", "data", "training", "objectives", "tracking", "checkpoint",
        "evaluation", "monitoring", "reporting", "planning", "run", "commands",
    ),
}  # fmt: skip
"""The rooms of each package, from the ground up. A room imports from itself and from the rooms before it; a module
outside of all rooms imports from all of them, and no room imports it."""
MOST = 15
"""Modules in a folder, at most."""
PACKAGES = {
    each.__name__: Path(str(each.__file__)).parent for each in (dmdr_core, dmdr_rewards, dmdr_models, dmdr_train)
}
BELOW = {
    "dmdr_core": set(),
    "dmdr_rewards": set(),
    "dmdr_models": {"dmdr_core"},
    "dmdr_train": {"dmdr_core", "dmdr_rewards", "dmdr_models"},
}
SLOW = ("torch", "deepspeed", "diffusers", "transformers", "datasets", "matplotlib")


def modules(package: Path) -> dict[str, Path]:
    """The source files of a package, by the names of their modules."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, path: Path) -> Iterator[str]:
    """The names that a module imports, at the top, inside of functions, and for types alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = module.split(".")[: -node.level + (path.name == "__init__.py") or None] if node.level else []
            yield from (".".join([*outer, *filter(None, [node.module]), alias.name]) for alias in node.names)


def graph(package: Path) -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports."""
    known = modules(package)

    def module_of(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]  # a function of a module

    return {
        module: {module_of(name) for name in imported(module, path) if name.split(".")[0] == package.name}
        for module, path in known.items()
    }


def upward(package: Path, rooms: tuple[str, ...]) -> list[str]:
    """The imports of a room from another that is not before it."""

    def height(module: str) -> int:
        room = module.split(".")[1:2]
        return rooms.index(room[0]) if room and room[0] in rooms else len(rooms)

    return [
        f"{module} imports {other}"
        for module, others in graph(package).items()
        for other in sorted(others)
        if height(other) > height(module)
    ]


def circle(package: Path) -> list[str]:
    """Modules of which each imports the next, and the last is the first; empty if there is no such circle."""
    try:
        TopologicalSorter(graph(package)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def crowded(package: Path) -> list[str]:
    """The folders that hold too many modules."""
    counts = Counter(path.parent for path in modules(package).values() if path.name != "__init__.py")
    return [f"{folder.name}: {count}" for folder, count in counts.items() if count > MOST]


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_import_from_those_below(name: str) -> None:
    found = {each.split(".")[0] for module, path in modules(PACKAGES[name]).items() for each in imported(module, path)}
    assert found & PACKAGES.keys() <= {name} | BELOW[name]


@pytest.mark.parametrize("name", PACKAGES)
def test_the_rooms_are_the_list(name: str) -> None:
    assert {path.parent.name for path in PACKAGES[name].glob("*/__init__.py")} == set(ROOMS[name])


@pytest.mark.parametrize("name", PACKAGES)
def test_a_room_imports_from_those_before_it(name: str) -> None:
    assert upward(PACKAGES[name], ROOMS[name]) == []


@pytest.mark.parametrize(("name", "room"), [(name, room) for name, rooms in ROOMS.items() for room in rooms])
def test_to_enter_a_room_imports_nothing(name: str, room: str) -> None:
    """`--help` answers at once, and a check of the recipe needs no torch."""
    source = (PACKAGES[name] / room / "__init__.py").read_text(encoding="utf-8")
    assert [type(node) for node in ast.parse(source).body] == [ast.Expr]
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize(
    "module", ["cli", "run.preflight", "run.python_api", "commands.report", "reporting.curves", "reporting.tables"]
)
def test_what_answers_at_once_imports_nothing_slow(module: str) -> None:
    program = f"import sys, dmdr_train.{module}; print(*{set(SLOW)} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", PACKAGES)
def test_modules_do_not_import_each_other_in_a_circle(name: str) -> None:
    assert circle(PACKAGES[name]) == []


@pytest.mark.parametrize("name", PACKAGES)
def test_no_folder_is_crowded(name: str) -> None:
    assert crowded(PACKAGES[name]) == []


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name in ("house", "house/cellar", "house/attic"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "house/cellar/wine.py").touch()
    (tmp_path / "house/attic/books.py").write_text("from house.cellar import wine\n")
    return tmp_path / "house"


def test_what_points_downward_passes(house: Path) -> None:
    assert upward(house, ("cellar", "attic")) == circle(house) == crowded(house) == []


@pytest.mark.parametrize(
    "source",
    [
        "import house.attic.books",
        "from house.attic import books",
        "from house.attic.books import read",
        "from ..attic import books",
        "from ..attic.books import read",
        "def drink():\n    from house.attic import books",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.attic.books import read",
    ],
)
def test_an_upward_import_is_found(house: Path, source: str) -> None:
    (house / "cellar/wine.py").write_text(source)
    assert upward(house, ("cellar", "attic")) == ["house.cellar.wine imports house.attic.books"]
    assert set(circle(house)) == {"house.cellar.wine", "house.attic.books"}


def test_a_room_does_not_import_what_stands_at_the_top(house: Path) -> None:
    (house / "program.py").write_text("from house.attic import books")
    assert upward(house, ("cellar", "attic")) == []
    (house / "attic/__init__.py").write_text("from ..program import main")
    assert upward(house, ("cellar", "attic")) == ["house.attic imports house.program"]


def test_a_crowd_is_found(house: Path) -> None:
    for i in range(MOST):
        (house / f"cellar/wine{i}.py").touch()
    assert crowded(house) == [f"cellar: {MOST + 1}"]


LONGEST_MODULE, LONGEST_FUNCTION = 400, 60


def long(package: Path) -> list[str]:
    """The modules and functions of too many lines."""
    found = []
    for path in modules(package).values():
        source = path.read_text(encoding="utf-8")
        if source.count("\n") > LONGEST_MODULE:
            found.append(path.name)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION:  # type: ignore[operator]
                found.append(f"{path.name}: {node.name}")
    return found


@pytest.mark.parametrize("name", PACKAGES)
def test_modules_and_functions_are_short(name: str) -> None:
    assert long(PACKAGES[name]) == []


def test_what_is_too_long_is_found(house: Path) -> None:
    body = "    pass\n" * (LONGEST_FUNCTION - 1)
    (house / "cellar/wine.py").write_text(f"def drink():\n{body}")
    assert long(house) == []
    (house / "cellar/wine.py").write_text(f"def drink():\n{body}    pass\n" + "\n" * LONGEST_MODULE)
    assert long(house) == ["wine.py", "wine.py: drink"]
