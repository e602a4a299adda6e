"""The manual: its navigation names every page, its links lead somewhere, and its commands can be typed."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dmdr_models import options, serve
from dmdr_models.generate import _parser as generate_parser
from dmdr_train import cli
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe
from manual_links import rewritten

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
COMMANDS_OF = ("index.md", "five_minutes.md", "faq.md", "report.md", "serve.md")


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


def typed(page: str) -> list[list[str]]:
    """The commands of dmdr in a page's indented lines."""
    lines = re.findall(r"^ {4,}(dmdr-(?:train|generate) .+)$", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", COMMANDS_OF)
def test_commands_can_be_typed(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    for module in cli.COMMANDS.values():
        monkeypatch.setattr(module, "command", ran.append)
    commands = typed(page)
    for program, *arguments in commands:
        if program == "dmdr-train":
            cli.main(arguments)
            config = getattr(ran[-1], "config", None) or "RECIPE"
            if config != "RECIPE":
                load_recipe(config, ran[-1].overrides)
        elif arguments[0] == "serve":
            ran.append(serve._parser().parse_args(arguments[1:]))
        else:
            ran.append(generate_parser().parse_intermixed_args(arguments))
    assert len(ran) == len(commands)
    assert commands or page == "index.md"


def test_a_command_that_cannot_be_typed_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", "runs/mine", "--no-such-option"])
    with pytest.raises(SystemExit):
        serve._parser().parse_args(["--model", "x", "--no-such-option"])


@pytest.mark.parametrize("page", COMMANDS_OF)
def test_keys_are_those_of_recipes(page: str) -> None:
    schema = Recipe.model_json_schema()
    known = {name for part in [schema, *schema["$defs"].values()] for name in part.get("properties", {})}
    text = PAGES[page].read_text(encoding="utf-8")
    sections = "|".join(Recipe.model_fields)
    for key in re.findall(rf"\b((?:{sections})(?:\.\w+)+)(?==|`)", text):
        assert set(re.findall(r"[a-z_]\w*", key)) <= known, key


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
