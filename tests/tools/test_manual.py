"""The manual: its navigation names every page, and its links lead somewhere. test_examples.py tests its examples."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dmdr_models import options, serve
from manual_links import rewritten

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}


def named(node: Any) -> Iterator[str]:
    """The pages of a part of the navigation."""
    if isinstance(node, str):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from named(inner)


def test_the_navigation_names_every_page_once() -> None:
    pages = list(named(CONFIG["nav"]))
    assert sorted(pages) == sorted([*PAGES, "first_steps.ipynb"])
    assert CONFIG["strict"] is True


@pytest.mark.parametrize("page", [name for name in PAGES if name.startswith("api/")])
def test_the_reference_names_modules(page: str) -> None:
    modules = re.findall(r"^::: (.+)$", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE)
    assert len(modules) >= 4
    for module in modules:
        package = module.split(".")[0].replace("_", "-")
        assert (ROOT / "packages" / package / "src" / f"{module.replace('.', '/')}.py").is_file(), module


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as MkDocs and the usual forges make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = PAGES[page]
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_links_that_leave_the_manual() -> None:
    text = "[a](../tools/x.py), [b](../report.md#y), [c](https://x.org/../y), [d](../../README.md)"
    assert rewritten(text, "objectives/dpo.md", None) == text.replace("[d](../../README.md)", "d (`README.md`)")
    assert rewritten("[a](../tools/x.py)", "index.md", None) == "a (`tools/x.py`)"
    hosted = rewritten("[a](../tools/x.py)", "index.md", "https://host/dmdr/")
    assert hosted == "[a](https://host/dmdr/blob/main/tools/x.py)"
    assert rewritten("[a\nb](./c.md)", "index.md", None) == "[a\nb](./c.md)"


def test_both_programs_share_their_options() -> None:
    assert {"model", "weights", "adapter", "size"} <= vars(serve._parser().parse_args(["--model", "x"])).keys()
    assert set(options.DRAWING_OPTIONS) <= vars(serve._parser().parse_args(["--model", "x"])).keys()
