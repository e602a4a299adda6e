"""The recipes that come with dmdr-train, as texts with their comments."""

import re

from dmdr_train.recipe.load import BUILT_IN, find_recipe


def names() -> list[str]:
    """The names of the built-in recipes, in the order of the alphabet."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def about(text: str) -> str:
    """What a recipe makes: the paragraph of comments that it begins with, in one line."""
    comments = re.match(r"(#.*\n)*", text)
    assert comments
    lines = [line.removeprefix("#").strip() for line in comments[0].splitlines()]
    return " ".join(lines[: lines.index("")] if "" in lines else lines)


def notes(text: str) -> dict[str, str]:
    """The notes of a recipe's comments, such as "Needs" and "Takes", each in one line."""
    found: dict[str, str] = {}
    label = ""
    for line in (line.removeprefix("#") for line in text.splitlines() if line.startswith("#")):
        if begins := re.match(r" (\w+): +(.*)", line):
            label = begins[1]
            found[label] = begins[2]
        elif label and line.strip():
            found[label] += f" {line.strip()}"
    return found


def source(name: str) -> str:
    """The text of a built-in recipe as its file has it.

    Raises:
        UserError: there is no such recipe.
    """
    return find_recipe(name, "name").read_text(encoding="utf-8")


def copied(name: str) -> str:
    """The text of a built-in recipe for another folder: paths that start at its own folder become absolute.

    Raises:
        UserError: there is no such recipe.
    """
    return source(name).replace("../problems/", f"{BUILT_IN.parent}/problems/")
