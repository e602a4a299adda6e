"""The examples of the manual, for the tests: the blocks of a page, and the commands, keys and recipes in them."""

import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "packages").glob("*/README.md")),
    )
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = ("dmdr-train", "dmdr-generate", "dmdr-score")
LAUNCHERS = (*PROGRAMS, "python", "deepspeed", "torchrun", "srun", "hatch", "docker", "taskset", "OFFICIAL/bin/python")
PLACEHOLDERS = {
    r"--gpu NAME": "--gpu H100", r"bench NAME": "bench step", r"=W\b": "=1", r" OVERRIDES": "", r"\bN\b": "2",
    r"\bM\b": "2", r"\bGB\b": "80", r"PER_GPU_HOUR": "2.5", r"\bRECIPE\b": "demo-t2i", r"X\.Y\.Z": "1.0.0",
}  # fmt: skip
"""What stands in examples for values that the reader puts in, as regular expressions."""


def fenced(page: str) -> list[tuple[str, str]]:
    """The language and the text of each block between fences."""
    return [(language, text) for language, text in FENCE.findall(PAGES[page])]


def indented(page: str) -> list[str]:
    """The indented blocks, which begin after a blank line."""
    text = FENCE.sub("", PAGES[page])
    return [textwrap.dedent(block).rstrip() for block in re.findall(r"(?<=\n\n)(?: {4,}.*\n+)+", text)]


def inline(page: str) -> list[str]:
    """The code within lines, each on one line."""
    text = FENCE.sub("", re.sub(r"^ {4,}.*\n", "\n", PAGES[page], flags=re.MULTILINE))
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`", text)]


def python_blocks(page: str) -> list[str]:
    """The blocks of Python, between fences or indented."""
    return [text for language, text in fenced(page) if language == "python"] + [
        block for block in indented(page) if re.match(r"import \w+\n", block)
    ]


def yaml_blocks(page: str) -> list[str]:
    """The parts of recipes: blocks of YAML between fences, and indented blocks that begin with a key alone."""
    return [text for language, text in fenced(page) if language == "yaml"] + [
        block for block in indented(page) if re.match(r"[a-z_]+:(\n| \{)", block)
    ]


def lines(block: str) -> Iterator[str]:
    """The lines of a block of commands; a line that is indented deeper, or follows a backslash, continues the last."""
    joined: list[str] = []
    for line in block.splitlines():
        if joined and (line.startswith(" ") or joined[-1].endswith("\\")):
            joined[-1] = f"{joined[-1].removesuffix(chr(92)).rstrip()} {line.strip()}"
        else:
            joined.append(line)
    yield from joined


def commands(page: str) -> list[list[str]]:
    """The words of the commands in blocks that start a program of ours, without the launcher before it.

    The first word is a program, or `-m`, or the path of a file of the repository. Optional parts in brackets count as
    given, and placeholders are replaced. A command with three dots in it is left out.
    """
    blocks = [text for language, text in fenced(page) if language in ("", "bash")] + indented(page)
    found = []
    for line in (line for block in blocks for line in lines(block)):
        plain = re.sub(r"\[(-[^\]]+)\]", r"\1", re.sub(r"\[[^\[\]]*…\]|\[options\]", "", line))
        for placeholder, value in PLACEHOLDERS.items():
            plain = re.sub(placeholder, value, plain)
        first = next((word for word in plain.split() if "=" not in word), "")
        if first in LAUNCHERS and "…" not in plain:
            found += [started(shlex.split(part, comments=True)) for part in plain.split("&&")]
    return [words for words in found if words]


def started(words: list[str]) -> list[str]:
    """The words from the program of ours on; none if the command starts another one."""
    if words[:2] == ["docker", "run"] and "torchrun" not in words:  # the image's entry point
        return ["dmdr-train", *words[words.index("dmdr") + 1 :]]
    for i, word in enumerate(words):
        if word in PROGRAMS or word.startswith("tools/") or word.endswith("/run.py"):
            return words[i:]
        if word == "-m" and words[i + 1].startswith("dmdr_"):
            return words[i:]
    return []


def abbreviated(page: str) -> list[list[str]]:
    """The words of commands within lines, which may lack what a complete command needs."""
    found = [started(code.split()) for code in inline(page) if "'" not in code and code.split()[0] in LAUNCHERS]
    return [words for words in found if len(words) > 1]


def files(page: str) -> list[str]:
    """The files of the repository that a page names within lines."""
    named = [re.match(r"(?:python )?((?:tools|tests|packages|docs)/[\w./-]+)", code) for code in inline(page)]
    return [name[1] for name in named if name]


def keys(page: str, sections: Iterable[str]) -> list[str]:
    """The keys of recipes within lines: dotted names that begin with a section."""
    found = [re.findall(rf"(?<![\w./-])(?:{'|'.join(sections)})(?:\.\w+)+\b(?!\()", code) for code in inline(page)]
    return [key for each in found for key in each if not re.search(r"\.(py|md|yaml|json|txt|png)$", key)]
