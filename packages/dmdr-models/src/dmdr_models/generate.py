"""`dmdr-generate`: pictures from a model folder, of class labels (sit) or of texts (sd3, sdxl).

Of labels it draws one grid with a row per class. Of texts it draws one picture each (several go to OUT-00000.png and so
on), or one contact sheet.

Picture number i, counted from 0, is drawn alone from its own CPU generator with the seed `seed + i`: it is the same
however many others are drawn, and on the CPU the same to the byte.

A student that dmdr-train exported knows how it wants to be sampled: `dmdr.json` in its folder holds any of family,
steps, method, guidance and shift, and for texts size and max_tokens. They take the place of the defaults; options given
on the command line win. Where a student for texts lacks that file, its scheduler/ tells method and, for sd3, shift.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dmdr_models.base.secrets import redact_tracebacks, redacted
from dmdr_models.drawing import own_sampler as generate_labels
from dmdr_models.drawing.settings import DTYPES, Settings, UsageError, read_student, student_folder
from dmdr_models.drawing.stock_pipeline import Texts
from dmdr_models.folder.contents import PARTS, network_part
from dmdr_models.sd3 import drawing as sd3
from dmdr_models.sdxl import drawing as sdxl

KINDS: dict[str, Any] = {"sit": generate_labels, "sd3": Texts("sd3", sd3), "sdxl": Texts("sdxl", sdxl)}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, redacted(f"{self.prog}: {message}\n"))


def main(argv: Sequence[str] | None = None) -> None:
    redact_tracebacks()
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    try:
        _run(args)
    except UsageError as error:
        parser.error(" ".join(str(error).split()))


def _parser() -> Parser:
    parser = Parser(
        prog="dmdr-generate",
        description=__doc__.split("\n", 1)[1].strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the model in diffusers' layout")
    parser.add_argument("--family", help="sit, sd3 or sdxl (default: what the folder holds)")
    parser.add_argument(
        "--weights",
        "--unet",
        metavar="PLACE",
        help="take the network from here: a student's folder, or a state dict in a .safetensors or .bin file",
    )
    parser.add_argument("--vae", metavar="FOLDER", help="take the decoder from here instead of MODEL/vae")
    parser.add_argument("--steps", type=int, help="(default: 4 for sd3, else 1)")
    parser.add_argument("--method", help="euler or sde; for sit also heun (default: sde for sdxl, else euler)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is none (default: none)")
    parser.add_argument(
        "--shift", type=float, help="of the times towards noise, for sit and sd3 (default: 1, sd3's own)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the model (default: fp32)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.png", help="where the picture goes")
    labels = parser.add_argument_group("of class labels (sit)")
    labels.add_argument("--classes", help="class labels, separated by commas: 207,360")
    labels.add_argument("--per-class", type=int, help="pictures per class (default: 4)")
    labels.add_argument("--separate", type=Path, metavar="DIR", help="also write every picture: DIR/INDEX-LABEL.png")
    texts = parser.add_argument_group("of texts (sd3, sdxl)")
    texts.add_argument("texts", nargs="*", metavar="PROMPT", help="what to draw")
    texts.add_argument("--prompts", metavar="FILE", help="take prompts from here, one per line")
    texts.add_argument("--adapter", metavar="FOLDER", help="a student's LoRA, in PEFT's layout")
    texts.add_argument("--size", type=int, help="side of the picture in pixels (default: the model's own)")
    texts.add_argument("--max-tokens", type=int, help="length of T5's sequence, for sd3 (default: 128)")
    texts.add_argument("--times", help="trained, or stock: those of a plain diffusers call (default: trained)")
    texts.add_argument("--grid", action="store_true", default=None, help="all pictures on one contact sheet")
    return parser


def _run(args: argparse.Namespace) -> None:
    folder = student_folder(Path(args.adapter or args.weights or args.model))
    source, student = read_student(folder)
    name = _family(args, source, student)
    kind = KINDS[name]
    _check_options(args, name, kind)
    if not student:
        source, student = kind.said_by_scheduler(folder)
    settings = Settings(kind.defaults, student, source, args)
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed {args.seed} is not in [0, 2^63): give a smaller whole number")
    _check_outputs(args.output, args.separate)
    _write(kind.run(args, settings), args.output)


def _family(args: argparse.Namespace, source: Path, student: dict[str, Any]) -> str:
    if args.family and student.get("family", args.family) != args.family:
        raise UsageError(f"--family {args.family} contradicts {source}, which says {student['family']}: leave it out")
    name = args.family or student.get("family") or _found_in(Path(args.model))
    if name is None:
        raise UsageError(
            f"--model {args.model} holds no transformer of a known family, nor a unet: give the folder of a model, or "
            f"for one on the hub also --family {' or '.join(KINDS)}"
        )
    if name not in KINDS:
        raise UsageError(f"unknown model family {name!r}; valid are {', '.join(KINDS)}")
    return name


def _found_in(folder: Path) -> str | None:
    """The family of a local model folder."""
    for name, parts in PARTS.items():
        part = network_part(name)
        try:
            kind = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if kind in parts[part]:
            return name
    return None


def _check_options(args: argparse.Namespace, name: str, kind: Any) -> None:
    """An option that has no effect is a mistake."""
    for other in KINDS.values():
        for option in (*other.options, *other.defaults):
            if option not in (*kind.options, *kind.defaults) and getattr(args, option) not in (None, []):
                shown = "a PROMPT" if option == "texts" else f"--{option.replace('_', '-')}"
                raise UsageError(f"{shown} is not for {name}, the family of {args.model}: leave it out")


def _check_outputs(output: Path, separate: Path | None) -> None:
    """Before the model is loaded, so that nobody waits for pictures that cannot be written."""
    if output.suffix.lower() != ".png":
        raise UsageError(f"-o {output} ends in {output.suffix or 'nothing'}: give a name that ends in .png")
    if output.is_dir():
        raise UsageError(f"-o {output} is a folder: give the name of a file in it")
    if separate is not None and separate.exists() and not separate.is_dir():
        raise UsageError(f"--separate {separate} is a file: give a folder")
    for option, path in (("-o", output), ("--separate", separate)):
        if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
            raise UsageError(f"{option} {path}: {path.parent} is no folder that can be written to: create it first")


def _write(files: dict[Path, Any], output: Path) -> None:
    from dmdr_models.drawing.images import save_png

    try:
        for path, picture in files.items():
            path.parent.mkdir(exist_ok=True)
            save_png(picture, path)
            print(path)
    except OSError as error:
        raise UsageError(f"-o {output}: cannot be written: {error}; give another place") from error


if __name__ == "__main__":
    main()
