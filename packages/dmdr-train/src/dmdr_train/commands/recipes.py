"""`dmdr-train recipes`: list, show and copy the built-in recipes. Imports no torch."""

import argparse
import shutil
import textwrap
from pathlib import Path

HELP = "list, show or copy the built-in recipes"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    actions = parser.add_subparsers(metavar="action", dest="action")
    actions.add_parser("list", help="name every recipe, and say what it makes, needs and takes; the default")
    show = actions.add_parser("show", help="print a recipe with its comments")
    copy = actions.add_parser("copy", help="write a recipe with its comments to a file, to change it there")
    for each in (show, copy):
        each.add_argument("name", help="the name of a built-in recipe, such as demo")
    copy.add_argument("file", help="the file to write; it must not exist")


def command(options: argparse.Namespace) -> None:
    """List, show or copy."""
    from dmdr_train.base.atomic_files import write_whole
    from dmdr_train.base.errors import UserError
    from dmdr_train.base.folders import check_writable
    from dmdr_train.recipe import shipped

    if options.action == "show":
        print(shipped.source(options.name), end="")
    elif options.action == "copy":
        file, text = Path(options.file), shipped.copied(options.name)
        if file.exists():
            raise UserError("file", f"{file} already exists; give a new file")
        check_writable("file", file.parent)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"Wrote {file}; start it with: dmdr-train run --config {file}")
    else:
        print("\n".join(map(described, shipped.names())))


def described(name: str) -> str:
    """A recipe's name and, indented, what it makes, needs and takes."""
    from dmdr_train.recipe import shipped

    text = shipped.source(name)
    notes = shipped.notes(text)
    lines = [shipped.about(text), *(f"{label}: {notes[label]}" for label in ("Needs", "Takes") if label in notes)]
    width = min(110, shutil.get_terminal_size().columns)
    return "\n".join([name, *(textwrap.indent(textwrap.fill(line, width - 4), "    ") for line in lines), ""])
