"""The class labels or the texts that `dmdr-generate` is asked for, and their list beside the pictures.

Imports no torch.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmdr_models.base.atomic_files import write_whole
from dmdr_models.base.errors import UsageError
from dmdr_models.base.json_files import parse_json
from dmdr_models.base.text_files import text_lines, text_prompts

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

LIST = "prompts.jsonl"
"""The file beside the pictures that lists their prompts; dmdr-score reads it."""


def read_labels(text: str | None) -> list[int]:
    """The labels of `--classes`."""
    if text is None:
        raise UsageError("--classes is not given: give labels such as 207,360")
    try:
        return [int(label) for label in text.split(",")]
    except ValueError:
        raise UsageError(f"--classes {text!r} is not a list of numbers: give labels such as 207,360") from None


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts of the command line, or those of the file `--prompts`."""
    if (args.prompts is None) == (not args.texts):
        raise UsageError("prompts are not given, or given twice: give texts, or else --prompts FILE with one per line")
    if args.prompts is None:
        return args.texts
    if Path(args.prompts).suffix.lower() in TABLES:
        raise UsageError(f"--prompts {args.prompts} is a table: give a text file with one prompt per line")
    try:
        prompts = text_prompts(args.prompts)
    except OSError as error:
        raise UsageError(f"--prompts {args.prompts} cannot be read: {error.strerror}; give a text file") from error
    except ValueError as error:
        raise UsageError(f"--prompts: {error}") from error
    if not prompts:
        raise UsageError(f"--prompts {args.prompts} holds no prompt: write one per line")
    return prompts


def list_prompts(pictures: Mapping[Path, Mapping[str, Any]]) -> None:
    """List pictures in `LIST` of their folder: a row each, with `file_name` and what is given, a `prompt` or `label`.

    Rows of other pictures stay. A file of that name that does not list pictures, such as one with prompts for training,
    stays as it is, with a line on stderr.

    Raises:
        OSError: the file cannot be read or written.
    """
    for folder in sorted({path.parent for path in pictures}):
        file = folder / LIST
        try:
            rows = _listed(file) if file.exists() else {}
        except ValueError as error:
            print(f"{file} stays as it is: {error}", file=sys.stderr)
            continue
        rows |= {
            path.name: {"file_name": path.name, **given} for path, given in pictures.items() if path.parent == folder
        }
        _write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows.values()), file)


def _write(text: str, file: Path) -> None:
    write_whole(file, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace"))


def _listed(file: Path) -> dict[str, dict[str, Any]]:
    rows = [parse_json(line.encode(), f"line {number}") for number, line in text_lines(file) if line.strip()]
    if not all(isinstance(row.get("file_name"), str) for row in rows):
        raise ValueError("it has rows without file_name, and does not list pictures")
    return {row["file_name"]: row for row in rows}
