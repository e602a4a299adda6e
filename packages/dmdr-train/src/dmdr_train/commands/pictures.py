"""`dmdr-train pictures`: write real pictures as latents, with their prompts or class labels."""

import argparse
from pathlib import Path

from dmdr_train.commands.recipe_options import add_recipe_options, positive

HELP = "write real pictures as latents, for guidance.discriminator"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    add_recipe_options(parser)
    parser.add_argument(
        "--images",
        required=True,
        help="pictures as dmdr-score takes them, a folder with a folder of pictures per class, or shapes or scenes",
    )
    parser.add_argument("--prompts", help="table with file_name and prompt (or label), as dmdr-score takes it")
    parser.add_argument("-o", "--output", required=True, help="folder to write")
    parser.add_argument("--column", help="of the pictures in parquet files and datasets, as in dmdr-score")
    parser.add_argument(
        "--count", type=positive, help="take only so many, chosen by run.seed; of shapes and scenes: draw so many"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="pictures encoded at once (default: 8)")


def command(options: argparse.Namespace) -> None:
    """Check the recipe, then encode the pictures."""
    from dmdr_train.distributed.device_name import name_device
    from dmdr_train.recipe.load import load_recipe
    from dmdr_train.run import preflight

    settings = load_recipe(options.config, options.overrides)
    preflight.check_model(settings)

    name_device(settings.run.device)
    from dmdr_train.training.encode_pictures import encode_pictures

    encode_pictures(
        settings,
        Path(options.output),
        options.images,
        options.prompts,
        options.column,
        options.count,
        options.batch_size,
    )
