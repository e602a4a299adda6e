"""docs/extending.md shows the files of the package as they are, and they are short."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dmdr_train.training.objective import NEEDS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests/plugins/package"
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    "objective": ("matching.py",), "family": ("layout.py", "family.py"), "tracker": ("diary.py",),
    "reward": ("redness.py",),
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_page_shows_the_files_of_the_package() -> None:
    files = [PACKAGE / "src/pixel_plugins" / name for names in EXAMPLES.values() for name in names]
    assert blocks("python") == [file.read_text(encoding="utf-8") for file in files]
    assert blocks("toml") == [(PACKAGE / "pyproject.toml").read_text(encoding="utf-8")]


@pytest.mark.parametrize("kind", EXAMPLES)
def test_an_example_has_at_most_fifty_lines(kind: str) -> None:
    sources = [(PACKAGE / "src/pixel_plugins" / name).read_text(encoding="utf-8") for name in EXAMPLES[kind]]
    assert sum(source.count("\n") for source in sources) <= 50


def test_the_page_lists_all_needs() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE, flags=re.MULTILINE)) == NEEDS


def test_the_recipe_of_the_page_is_valid(stranger: Callable[..., Any], tmp_path: Path) -> None:
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    run = str(ROOT / "packages/dmdr-train/run.py")
    stranger(run, "--config", "recipe.yaml", "--print-config", folder=tmp_path).check()
