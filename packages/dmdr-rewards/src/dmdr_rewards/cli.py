"""The program dmdr-score: score pictures, and describe and check rewards.

    dmdr-score IMAGES --prompts FILE --reward [COLUMN@]NAME=CHECKPOINT[:WEIGHT] … -o OUTPUT
    dmdr-score compare A B --features NAME=CHECKPOINT …
    dmdr-score list | info NAME | verify NAME CHECKPOINT

Arguments are checked before torch is imported, so a mistake is reported at once. Exit codes: 0 for success; 1 for a run
that had to stop, and that the same command continues; 2 for a mistake in the arguments.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from dmdr_rewards import __version__
from dmdr_rewards.base.errors import USER_ERROR, naming, plain_warnings, user_errors
from dmdr_rewards.base.secrets import redact_tracebacks, redacted

_COMMANDS = """commands, in place of IMAGES (for a folder of that name, type ./list):
  compare A B              compare two sets of pictures: FD, KID, precision, recall, density, coverage, IS
  list                     list the rewards with their scores, prompts and licences
  info NAME                describe a reward without loading it
  verify NAME CHECKPOINT   load a checkpoint strictly, and print its size, its hash and a probe score
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {redacted(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(USER_ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Raises SystemExit for an exit code other than 0."""
    redact_tracebacks()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"compare": _compare, "list": _list, "info": _info, "verify": _verify}
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers shows one for each model
    with user_errors(), plain_warnings():
        try:
            if arguments and arguments[0] in commands:
                commands[arguments[0]](arguments[1:])
            else:
                _score(arguments)
        except KeyboardInterrupt:
            print("interrupted; the same command continues from here", file=sys.stderr)
            sys.exit(130)


def _score(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="dmdr-score",
        description="Score pictures with one or several rewards. The same command continues an interrupted run.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"%(prog)s {__version__}")
    add(
        "images",
        metavar="IMAGES",
        help="a folder, a glob, a table, a .tar archive, or a dataset on disk",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="a table of file_name and prompt (or label), or a .txt with a prompt per picture",
    )
    source.add_argument("--prompt", metavar="TEXT", help="one prompt or class label for all pictures")
    add(
        "--reward",
        action="append",
        required=True,
        metavar="[COLUMN@]NAME[=CHECKPOINT][:WEIGHT]",
        help="may be given several times; a COLUMN tells checkpoints of one reward apart",
    )
    add("--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="an option of one reward")
    steps = "preprocessing: each reward's official one, or DMDR's"
    add("--preprocess", choices=("reference", "dmdr"), help=steps)
    add("-o", "--output", required=True, metavar="FILE", help=".parquet, .jsonl or .csv")
    add("--overwrite", action="store_true", help="ignore the scores in FILE and score all pictures again")
    add("--html", metavar="FILE", help="also write a page that shows the pictures, best first")
    add("--html-limit", type=_count, default=200, metavar="N", help="most pictures on that page (default: %(default)s)")
    add("--column", metavar="NAME", help="the column of the pictures in parquet files and datasets (default: image)")
    add("--strict", action="store_true", help="stop at a picture that cannot be scored, with exit code 1")
    _add_machine_options(parser)
    options = parser.parse_args(arguments)

    from dmdr_rewards.score.command import score

    score(options)


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1 … (default: cuda if available)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the networks (default: %(default)s)",
    )
    add("--batch-size", type=_count, default=32, metavar="N", help="pictures scored at once (default: %(default)s)")
    add(
        "--workers",
        type=_count_or_none,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read pictures; 0 reads them in the main process (default: %(default)s)",
    )


def _compare(arguments: Sequence[str]) -> None:
    parser = _Parser(
        prog="dmdr-score compare",
        description="Compare the pictures A with the reference B: FD, KID, precision, recall, density, coverage, IS.",
    )
    add = parser.add_argument
    add("a", metavar="A", help="the pictures to judge: a folder, a glob, a table, a .tar archive, or a dataset on disk")
    add("b", metavar="B", help="the reference, in the same forms; or an .npz with mu and sigma, for FD")
    add(
        "--features",
        action="append",
        required=True,
        metavar="[COLUMN@]NAME=CHECKPOINT",
        help="inception, dinov2, clip, class-label, or a reward with an image tower; may be given several times",
    )
    add("--option", action="append", default=[], metavar="NAME.KEY=VALUE", help="an option of one network")
    add("--size", type=_count, metavar="SIDE", help="first crop and resize all pictures to squares of this side")
    add(
        "--halves",
        type=_count_or_none,
        default=20,
        metavar="N",
        help="random halves for the intervals of 95 %%; 0 for none (default: %(default)s)",
    )
    add("--column", metavar="NAME", help="the column of the pictures in parquet files and datasets (default: image)")
    add("--json", action="store_true", help="print JSON in place of the table")
    add("-o", "--output", metavar="FILE", help="also write the JSON to this file")
    _add_machine_options(parser)
    options = parser.parse_args(arguments)
    if options.halves == 1:
        parser.error("--halves: 1 has no spread; give 0, or 2 and more")

    from dmdr_rewards.compare.command import compare

    compare(options)


def _list(arguments: Sequence[str]) -> None:
    _Parser(prog="dmdr-score list", description="List the built-in and installed rewards.").parse_args(arguments)
    from dmdr_rewards.interface.registry import available, describe

    rows = [("name", "prompt", "licence", "score")]
    for name in available():
        try:
            info = describe(name)
        except ValueError:  # a third party's factory without a description
            rows.append((name, "?", "?", "?"))
        else:
            rows.append((name, info.prompt, info.licence, info.description))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


def _info(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="dmdr-score info", description="Describe a reward without loading it.")
    parser.add_argument("name", metavar="NAME")
    name = parser.parse_args(arguments).name
    from dmdr_rewards.interface.registry import describe

    with naming("NAME"):
        info = describe(name)
    for field in dataclasses.fields(info):
        print(f"{field.name:<16}{getattr(info, field.name)}")


def _verify(arguments: Sequence[str]) -> None:
    text = "Load a checkpoint strictly, and print its size, its hash and a probe score."
    parser = _Parser(prog="dmdr-score verify", description=text)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the reward")
    parser.add_argument("--tensors", action="store_true", help="also print the name, type and shape of each tensor")
    options = parser.parse_args(arguments)

    from dmdr_rewards.score.verify import verify

    verify(options.name, options.checkpoint, options.option, options.tensors)


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _count_or_none(text: str) -> int:
    return _count(text, least=0)


if __name__ == "__main__":
    main()
