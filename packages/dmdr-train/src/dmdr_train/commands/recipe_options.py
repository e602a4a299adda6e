"""Command-line options that several commands have."""

import argparse


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and its overrides."""
    parser.add_argument("--config", required=True, help="a recipe file, or the name of a built-in recipe, such as demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the recipe's")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher passes it


def positive(text: str) -> int:
    """Read a positive whole number.

    Raises:
        ArgumentTypeError, ValueError: for any other text.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
