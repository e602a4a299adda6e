"""`dmdr-train export`: write the student of a run as a folder or as one file."""

import argparse

HELP = "write the student of a run's newest checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="folder of the run")
    parser.add_argument(
        "-o", "--output", required=True, help="folder, or .safetensors or .bin file of a state dict, to write"
    )
    parser.add_argument(
        "--layout",
        default="diffusers",
        help="names of the weights in a file: diffusers, or original for ComfyUI and kohya's scripts",
    )


def command(options: argparse.Namespace) -> None:
    """Write the student of the newest checkpoint."""
    from dmdr_train.run.python_api import export

    source = export(options.run, options.output, options.layout)
    print(f"Wrote {options.output}, from {source}")
