"""`dmdr-train pairs`: write pairs of noise and the picture that the teacher draws from it."""

import argparse
from pathlib import Path

from dmdr_train.commands.recipe_options import add_recipe_options, positive

HELP = "write pairs of noise and what the teacher draws from it"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    add_recipe_options(parser)
    parser.add_argument("-o", "--output", required=True, help="folder to write, or to add to")
    parser.add_argument("--count", type=positive, required=True, help="pairs in the folder, existing ones included")
    parser.add_argument("--steps", type=positive, default=50, help="of the deterministic sampler (default: 50)")
    parser.add_argument("--guidance", type=guidance, help="the teacher's guidance scale (default: the recipe's)")
    parser.add_argument("--batch-size", type=positive, default=8, help="pairs drawn at once (default: 8)")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of the teacher (default: bf16)"
    )


def guidance(text: str) -> float:
    """Read a guidance scale, which is at least 1.

    Raises:
        ArgumentTypeError, ValueError: for any other text.
    """
    scale = float(text)
    if not 1 <= scale < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 1, which is no guidance, got {text}")
    return scale


def command(options: argparse.Namespace) -> None:
    """Check the recipe, then draw the pairs."""
    from dmdr_train.distributed.device_name import name_device
    from dmdr_train.recipe.load import load_recipe
    from dmdr_train.run import preflight

    settings = load_recipe(options.config, options.overrides)
    preflight.check_data(settings, preflight.check_model(settings))

    name_device(settings.run.device)
    from dmdr_train.training.make_pairs import make_pairs

    make_pairs(
        settings,
        Path(options.output),
        options.count,
        options.steps,
        options.guidance,
        options.batch_size,
        options.dtype,
    )
