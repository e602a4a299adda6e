"""The class labels or the texts that `dmdr-generate` is asked for. Imports no torch."""

import argparse
from pathlib import Path

from dmdr_models.base.errors import UsageError
from dmdr_models.base.text_files import text_prompts

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


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
