"""The command line: `run.py --config RECIPE [key=value …]`, and `dmdr-train` with its commands.

A command is a module of `dmdr_train.commands`: it adds its options to a parser, and runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from dmdr_rewards.base.secrets import redact_tracebacks, redacted

from dmdr_train import __version__
from dmdr_train.base.errors import user_errors
from dmdr_train.base.exit_codes import EXIT_CODE
from dmdr_train.commands import encode, evaluate, export, init, pairs, pictures, plan, recipes, report, run
from dmdr_train.distributed.slurm import join_step

COMMANDS = {
    "run": run,
    "init": init,
    "recipes": recipes,
    "plan": plan,
    "encode": encode,
    "pairs": pairs,
    "pictures": pictures,
    "evaluate": evaluate,
    "export": export,
    "report": report,
}
ABOUT = "Distil a diffusion model to a few steps and align it with rewards."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {self.prog}: {redacted(message)}; see --help", file=sys.stderr)
        sys.exit(EXIT_CODE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Also take overrides that stand behind an option, which argparse leaves over."""
        options, others = super().parse_known_args(args, namespace)
        behind = [text for text in others if "=" in text and not text.startswith("-") and "overrides" in options]
        if behind:
            options.overrides = [*options.overrides, *behind]
        return options, [text for text in others if text not in behind]


def run_main(arguments: Sequence[str] | None = None) -> None:
    """The program run.py."""
    redact_tracebacks()
    join_step()
    parser = _parser("run.py")
    run.add_options(parser)
    with user_errors():
        run.command(parser.parse_intermixed_args(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `dmdr-train`."""
    redact_tracebacks()
    join_step()
    parser = _parser("dmdr-train")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it first
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=f"{module.HELP[0].upper()}{module.HELP[1:]}.")
        module.add_options(sub)
        sub.set_defaults(command=module.command)
    options = parser.parse_args(arguments)
    with user_errors():
        options.command(options)


def _parser(program: str) -> _Parser:
    parser = _Parser(prog=program, description=ABOUT)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser
