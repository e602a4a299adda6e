"""The command line: `run.py --config RECIPE [key=value …]` and `dmdr-train run | encode | pairs | evaluate | export |
report`.

Recipe and files are checked before torch is imported, so that a mistake is answered at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dmdr_rewards.base.secrets import redact_tracebacks, redacted

from dmdr_train.base.errors import EXIT_CODE, user_errors
from dmdr_train.distributed.slurm import join_step


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {self.prog}: {redacted(message)}; see --help", file=sys.stderr)
        sys.exit(EXIT_CODE)


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a recipe file, or the name of a built-in recipe, such as demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it


def add_run_options(parser: argparse.ArgumentParser) -> None:
    add_recipe_options(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--dry-run", action="store_true", help="build all, take a step of each stage, write nothing")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in run.output, which must exist; for another, run.resume=FOLDER",
    )


def add_encode_options(parser: argparse.ArgumentParser) -> None:
    add_recipe_options(parser)
    parser.add_argument("-o", "--output", required=True, help="folder to write, or to add to")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the embeddings (default: bf16)")
    parser.add_argument("--batch-size", type=_positive, default=32, help="prompts encoded at once (default: 32)")


def add_pairs_options(parser: argparse.ArgumentParser) -> None:
    add_recipe_options(parser)
    parser.add_argument("-o", "--output", required=True, help="folder to write, or to add to")
    parser.add_argument("--count", type=_positive, required=True, help="pairs that the folder is to hold")
    parser.add_argument("--steps", type=_positive, default=50, help="of the deterministic sampler (default: 50)")
    parser.add_argument("--guidance", type=_guidance, help="the teacher's guidance scale (default: guidance.cfg)")
    parser.add_argument("--batch-size", type=_positive, default=8, help="pairs drawn at once (default: 8)")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of the teacher (default: bf16)"
    )


def run_command(options: argparse.Namespace) -> None:
    """Read and check the recipe, then train."""
    from dmdr_train.recipe.load import dump_recipe, load_recipe
    from dmdr_train.run import preflight

    settings = load_recipe(options.config, options.overrides)
    if options.resume:
        output = os.path.join(".", settings.run.output)  # not one of the words that run.resume knows
        settings = load_recipe(options.config, [*options.overrides, f"run.resume={json.dumps(output)}"])
    if options.print_config:
        print(dump_recipe(settings), end="")
        return
    preflight.check(settings, int(os.environ.get("WORLD_SIZE", "1")), options.dry_run)

    if settings.run.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed chooses its device when it is imported
    from dmdr_train.run import runner

    if options.dry_run:
        logs = runner.dry_run(settings)
        if int(os.environ.get("RANK", "0")) == 0:
            for name, value in logs.items():
                print(f"{name} {value:.6g}")
            print("dry run: everything was built and each stage took a step; nothing was written")
    else:
        runner.run(settings)


def train(options: argparse.Namespace) -> None:
    """`run_command`, with an answer to the signals that come before or after the training."""
    from dmdr_train.distributed.signals import signals_end

    with signals_end():
        run_command(options)


def encode_command(options: argparse.Namespace) -> None:
    """Read and check the recipe and the cache that is there, then encode."""
    from dmdr_train.data import embedding_cache
    from dmdr_train.data.prompt_files import check_prompts
    from dmdr_train.recipe.load import load_recipe

    settings = load_recipe(options.config, options.overrides)
    check_prompts(settings.data)
    embedding_cache.prepare(settings, Path(options.output), options.dtype)

    if settings.run.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dmdr_train.data.encode import encode

    encode(settings, Path(options.output), options.dtype, options.batch_size)


def pairs_command(options: argparse.Namespace) -> None:
    """Read and check the recipe, then draw the pairs."""
    from dmdr_train.recipe.load import load_recipe
    from dmdr_train.run import preflight

    settings = load_recipe(options.config, options.overrides)
    preflight.check_data(settings, preflight.check_model(settings))

    if settings.run.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from dmdr_train.commands.make_pairs import make_pairs

    make_pairs(
        settings,
        Path(options.output),
        options.count,
        options.steps,
        options.guidance,
        options.batch_size,
        options.dtype,
    )


def evaluate_command(options: argparse.Namespace) -> None:
    from dmdr_train.commands.evaluate import evaluate

    evaluate(Path(options.run))


def export_command(options: argparse.Namespace) -> None:
    from dmdr_train.commands.export import export

    export(Path(options.run), Path(options.output))


def report_command(options: argparse.Namespace) -> None:
    from dmdr_train.commands.report import report

    report(Path(options.run))


def run_main(arguments: Sequence[str] | None = None) -> None:
    """The program behind run.py."""
    redact_tracebacks()
    join_step()
    parser = _Parser(prog="run.py", description="Distil a diffusion model and align it with rewards.")
    add_run_options(parser)
    with user_errors():
        train(parser.parse_intermixed_args(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """The program `dmdr-train`."""
    redact_tracebacks()
    join_step()
    parser = _Parser(prog="dmdr-train", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    add_run_options(_command(commands, "run", train, "train, as run.py does"))
    add_encode_options(
        _command(commands, "encode", encode_command, "write the embeddings of a recipe's prompts to a folder")
    )
    add_pairs_options(
        _command(commands, "pairs", pairs_command, "write pairs of noise and what the teacher makes of it")
    )
    for name, command, text in (
        ("evaluate", evaluate_command, "score the student of a run again"),
        ("export", export_command, "write the student of a run's newest checkpoint"),
        ("report", report_command, "draw curves.png of a run again, and print its table"),
    ):
        sub = _command(commands, name, command, text)
        sub.add_argument("run", help="folder of the run")
        if name == "export":
            sub.add_argument(
                "-o", "--output", required=True, help="folder, or .safetensors or .bin file of a state dict, to write"
            )
    options = parser.parse_args(arguments)
    with user_errors():
        options.command(options)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _guidance(text: str) -> float:
    scale = float(text)
    if not 1 <= scale < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 1, which is none, got {text}")
    return scale


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(command=function)
    return sub
