"""`dmdr-train plan`: what a recipe costs, before anything is paid for. It needs no GPU and reads no weights."""

import argparse
import json
import math

from dmdr_train.commands.recipe_options import positive

HELP = "show operations, memory, time and cost of a recipe, without weights and without a GPU"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("recipe", help="a recipe file, or the name of a built-in recipe, such as demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe's")
    parser.add_argument("--gpus", type=positive, default=1, help="GPUs in each machine (default: 1)")
    parser.add_argument("--nodes", type=positive, default=1, help="machines (default: 1)")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="kind of GPU, such as A100-80 (default: H100)")
    parser.add_argument(
        "--gpu-memory", type=amount, metavar="GB", help="memory of one GPU (default: that of this kind of GPU)"
    )
    parser.add_argument("--price", type=amount, metavar="PER_GPU_HOUR", help="price of one GPU for an hour")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, operations and seconds")


def amount(text: str) -> float:
    """Read a positive number.

    Raises:
        ArgumentTypeError, ValueError: for any other text.
    """
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def command(options: argparse.Namespace) -> None:
    """Count everything on torch's meta device and print the plan."""
    from dmdr_train.distributed.device_name import name_device
    from dmdr_train.planning.gpus import find_gpu
    from dmdr_train.recipe.load import load_recipe

    name_device("cpu")  # where DeepSpeed looks for a GPU and finds none, it says so on standard output
    settings, gpu = load_recipe(options.recipe, options.overrides, "recipe"), find_gpu(options.gpu)
    from dmdr_train.planning.plan import make_plan
    from dmdr_train.planning.table import as_json, as_text

    plan = make_plan(settings, gpu, options.gpus, options.nodes, options.gpu_memory, options.price)
    if options.json:
        print(json.dumps(as_json(options.recipe, plan), indent=2))
    else:
        print(as_text(options.recipe, plan), end="")
