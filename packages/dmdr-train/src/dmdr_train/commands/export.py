"""`dmdr-train export`: write the student of a run as a folder or as one file, and upload it."""

import argparse

HELP = "write the student of a run's newest checkpoint"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to its parser."""
    parser.add_argument("run", help="folder of the run")
    parser.add_argument(
        "-o", "--output", required=True, help="folder, or .safetensors or .bin file of a state dict, to write"
    )
    parser.add_argument(
        "--layout",
        default="diffusers",
        help="names of the weights in a file: diffusers, or original for ComfyUI and kohya's scripts",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also upload what was written to this repository of the Hugging Face hub, which is made if it is not "
        "there; the token is HF_TOKEN, or that of `hf auth login`",
    )
    parser.add_argument("--public", action="store_true", help="make the new repository public instead of private")


def command(options: argparse.Namespace) -> None:
    """Write the student of the newest checkpoint, and upload it if that is asked for."""
    from dmdr_train.base.errors import UserError
    from dmdr_train.reporting import hub
    from dmdr_train.run.python_api import export

    if options.push_to_hub is not None:
        hub.check(options.push_to_hub)
    elif options.public:
        raise UserError("--public", "has no effect alone; give --push-to-hub OWNER/NAME")
    source = export(options.run, options.output, options.layout)
    print(f"Wrote {options.output}, from {source}")
    if options.push_to_hub is not None:
        print(f"Uploaded to {hub.push(options.output, options.push_to_hub, options.public)}")
