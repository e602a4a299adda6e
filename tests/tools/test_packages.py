"""What PyPI would show of the four packages."""

import re
from pathlib import Path

import pytest
import tomllib

PACKAGES = sorted((Path(__file__).parents[2] / "packages").iterdir())


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_metadata(package: Path) -> None:
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["authors"] == [{"name": "The dmdr authors"}]
    assert len(project["keywords"]) >= 5
    assert {"Programming Language :: Python :: 3", "Typing :: Typed"} <= set(project["classifiers"])
    assert (package / "src" / package.name.replace("-", "_") / "py.typed").is_file()
    assert project["license"] == "Apache-2.0"
    assert not [name for name in project["classifiers"] if name.startswith("License ::")], "PEP 639 forbids both"
    assert (package / project["readme"]).is_file()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_link_is_dead_on_pypi(package: Path) -> None:
    """A README's links are absolute, or lead to another place in it: PyPI has no files beside it."""
    text = (package / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    links += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
