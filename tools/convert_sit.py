"""Convert a published SiT checkpoint (REPA's or the original) to a folder that dmdr_models.load("sit", ...) opens.

python tools/convert_sit.py last.pt -o sit-xl --vae sd-vae-ft-ema --source repa
"""

import argparse
from pathlib import Path
from typing import NoReturn

from dmdr_models import __version__


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("input", type=Path, help="the checkpoint: .pt or .safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--vae", type=Path, metavar="FOLDER", help="an AutoencoderKL to copy beside the transformer")
    parser.add_argument("--source", choices=["repa", "sit"], help="the origin; needed if the weights do not show it")
    parser.add_argument("--num-heads", type=int, help="for networks of an unpublished size without query norm")
    parser.add_argument("--num-classes", type=int, help="without the null class; needed if the weights do not show it")
    args = parser.parse_args()

    from dmdr_models.sit.convert import check_target, convert, read_checkpoint, save

    try:
        check_target(args.output)
        weights, options = read_checkpoint(args.input)
        config, weights = convert(weights, args.source, args.num_heads, args.num_classes, options)
        save(config, weights, args.output, args.vae)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.output}: " + ", ".join(f"{name} {value}" for name, value in config.items()))


if __name__ == "__main__":
    main()
