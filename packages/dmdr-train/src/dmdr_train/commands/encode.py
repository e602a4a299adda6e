"""`dmdr-train encode`: write the embeddings of a recipe's prompts to a folder."""

import argparse
from pathlib import Path

from dmdr_train.commands.recipe_options import add_recipe_options, positive

HELP = "write the embeddings of a recipe's prompts to a folder"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    add_recipe_options(parser)
    parser.add_argument("-o", "--output", required=True, help="folder to write, or to add to")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the embeddings (default: bf16)")
    parser.add_argument("--batch-size", type=positive, default=32, help="prompts encoded at once (default: 32)")


def command(options: argparse.Namespace) -> None:
    """Check the recipe and the folder, then encode."""
    from dmdr_train.data import embedding_cache
    from dmdr_train.data.prompt_files import check_prompts
    from dmdr_train.distributed.device_name import name_device
    from dmdr_train.recipe.load import load_recipe

    settings = load_recipe(options.config, options.overrides)
    check_prompts(settings.data)
    embedding_cache.prepare(settings, Path(options.output), options.dtype)

    name_device(settings.run.device)
    from dmdr_train.data.encode import encode

    encode(settings, Path(options.output), options.dtype, options.batch_size)
