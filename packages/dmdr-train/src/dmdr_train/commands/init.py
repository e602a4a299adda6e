"""`dmdr-train init`: write a first recipe for a model and GPUs, which fits by its plan."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmdr_train.commands.plan import amount
from dmdr_train.commands.recipe_options import positive

HELP = "write a recipe for your model that fits your GPUs by its plan"
FAMILIES = ("sit", "sd3", "sdxl")
OBJECTIVES = ("distribution_matching", "regression", "refl", "srpo", "joint")
CONTINUING = ("refl", "srpo")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("-o", "--output", default="recipe.yaml", help="file to write (default: recipe.yaml)")
    parser.add_argument("--family", choices=FAMILIES, help="of the model")
    parser.add_argument("--model", help="folder of the model, as diffusers has it, or the name of a well-known model")
    parser.add_argument(
        "--objective",
        choices=OBJECTIVES,
        help="distribution_matching distils alone (default); refl and srpo continue with rewards; joint does both",
    )
    parser.add_argument("--prompts", help="a file of prompts, for a model of texts (default: prompts.txt)")
    parser.add_argument("--init-from", metavar="RUN", help="the run that refl and srpo continue")
    parser.add_argument("--gpus", type=positive, help="GPUs in the machine (default: 1)")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="kind of GPU, such as A100-80 (default: H100)")
    parser.add_argument(
        "--gpu-memory", type=amount, metavar="GB", help="memory of one GPU (default: that of this kind of GPU)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe's")


def command(options: argparse.Namespace) -> None:
    """Ask for what is not given, on a terminal only, and write the recipe."""
    from dmdr_train.base.atomic_files import write_whole
    from dmdr_train.base.errors import UserError
    from dmdr_train.base.folders import check_writable
    from dmdr_train.distributed.device_name import name_device
    from dmdr_train.planning.gpus import find_gpu

    name_device("cpu")  # where DeepSpeed looks for a GPU and finds none, it says so on standard output
    file, gpu = Path(options.output), find_gpu(options.gpu)
    if file.exists():
        raise UserError("--output", f"{file} already exists; give a new file")
    check_writable("--output", file.parent)
    if sys.stdin.isatty() and sys.stdout.isatty():
        ask(options)
    for name in ("family", "model"):
        if getattr(options, name) is None:
            raise UserError(f"--{name}", "is required where there is no terminal to ask on; give it")
    if options.objective in CONTINUING and options.init_from is None:
        raise UserError("--init-from", f"{options.objective} continues a run; give its folder, or --objective joint")
    if options.family == "sit" and options.prompts is not None:
        raise UserError("--prompts", "a model of classes has none; leave it out")
    from dmdr_train.planning.first_recipe import Hardware, described, first_recipe
    from dmdr_train.planning.table import short_lines

    objective = options.objective or "distribution_matching"
    where = Hardware(gpu, options.gpus or 1, options.gpu_memory)
    text, plan = first_recipe(options.family, objective, overrides(options), where)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))
    print("\n  ".join([f"Wrote {file}, planned for {described(plan)}:", *short_lines(plan)]))
    print(f"Check it with: dmdr-train run --config {file} --dry-run")


def ask(options: argparse.Namespace) -> None:
    """Ask for the most important options that are not given; an empty answer takes the default."""
    questions = (
        ("family", f"Family of the model ({', '.join(FAMILIES)})", "sd3"),
        ("model", "Folder of the model", None),
        ("objective", f"Objective ({', '.join(OBJECTIVES)})", OBJECTIVES[0]),
        ("gpus", "GPUs in the machine", "1"),
        ("gpu_memory", "GB of each GPU (empty: those of the kind in --gpu)", ""),
    )
    readers: dict[str, Callable[[str], Any]] = {"gpus": positive, "gpu_memory": amount}
    for name, question, default in questions:
        if getattr(options, name) is None:
            setattr(options, name, answer(name, question, default, readers.get(name, str)))


def answer(name: str, question: str, default: str | None, read: Callable[[str], Any]) -> Any:
    """Ask until the answer can be used; None for an empty answer where it may be empty.

    Args:
        default: what an empty answer stands for; None where there must be one.
        read: turns the answer into a value, or raises an error whose text is shown.

    Raises:
        UserError: the input has ended.
    """
    from dmdr_train.base.errors import UserError

    choices = {"family": FAMILIES, "objective": OBJECTIVES}.get(name)
    while True:
        try:
            given = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError:
            raise UserError(f"--{name.replace('_', '-')}", "has no answer; give it") from None
        if given == "":
            return None
        try:
            if given is None or (choices and given not in choices):
                raise ValueError(f"give one of {', '.join(choices)}" if choices else "give a value")
            return read(given)
        except (ValueError, argparse.ArgumentTypeError) as error:
            print(f"  {error}")


def overrides(options: argparse.Namespace) -> list[str]:
    """The options as `key=value` texts, those of the user last."""
    found = [f"model.path={json.dumps(options.model)}", f"run.output={json.dumps(f'runs/{Path(options.output).stem}')}"]
    if options.family != "sit" and options.objective != "regression":
        found.append(f"data.prompts={json.dumps(options.prompts or 'prompts.txt')}")
    if options.init_from is not None:
        found.append(f"run.init_from={json.dumps(options.init_from)}")
    return [*found, *options.overrides]
