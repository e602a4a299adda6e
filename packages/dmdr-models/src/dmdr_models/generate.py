"""`dmdr-generate`: pictures from a model folder, of class labels or of texts.

Of labels it draws one grid with a row per class. Of texts it draws one picture each (several go to OUT-00000.png and so
on), or one contact sheet.

Beside pictures of one text or label each, prompts.jsonl lists what they were drawn of; dmdr-score reads it.

Picture number i, counted from 0, is drawn by itself from its own CPU generator with the seed `seed + i`: it is the same
however many others are drawn, and on the CPU the same to the byte.

A student that dmdr-train exported knows how it is to be sampled: `dmdr.json` in its folder holds any of family, steps,
method, guidance and shift, and for texts size and max_tokens. They take the place of the defaults; options given on the
command line win. If a student for texts lacks that file, its scheduler/ tells the method, and the shift if it has one.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dmdr_models import __version__, registry
from dmdr_models.base.errors import UsageError
from dmdr_models.base.picture_size import read_size
from dmdr_models.base.secrets import redact_tracebacks, redacted
from dmdr_models.drawing.interface import Drawing
from dmdr_models.drawing.prompts import list_prompts
from dmdr_models.drawing.settings import DTYPES, Settings, read_student, student_of
from dmdr_models.folder.checks import single_file
from dmdr_models.folder.layout import Layout

DRAWING_OPTIONS = (
    "steps", "method", "guidance", "shift", "classes", "per_class", "separate", "texts", "prompts", "adapter", "size",
    "max_tokens", "times", "grid",
)  # fmt: skip
"""The options that not every family takes."""


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
    defaults = {layout.name: layout.drawing().defaults for layout in registry.layouts()}
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the model in diffusers' layout")
    parser.add_argument("--family", help=f"{', '.join(registry.names())} (default: what the folder holds)")
    parser.add_argument(
        "--weights",
        "--unet",
        metavar="PLACE",
        help="take the network from here: a student's folder, or a state dict in a .safetensors or .bin file",
    )
    parser.add_argument("--vae", metavar="FOLDER", help="take the decoder from here instead of MODEL/vae")
    parser.add_argument("--steps", type=int, help=_default("steps", defaults))
    parser.add_argument(
        "--method", help=f"euler, sde, or for families without a pipeline heun {_default('method', defaults)}"
    )
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 is none (default: none)")
    parser.add_argument("--shift", type=float, help=f"of the times towards noise {_default('shift', defaults)}")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the model (default: fp32)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.png", help="where the picture goes")
    labels = parser.add_argument_group("of class labels")
    labels.add_argument("--classes", help="class labels, separated by commas: 207,360")
    labels.add_argument("--per-class", type=int, help="pictures per class (default: 4)")
    labels.add_argument("--separate", type=Path, metavar="DIR", help="also write every picture: DIR/INDEX-LABEL.png")
    texts = parser.add_argument_group("of texts")
    texts.add_argument("texts", nargs="*", metavar="PROMPT", help="what to draw")
    texts.add_argument("--prompts", metavar="FILE", help="take prompts from here, one per line")
    texts.add_argument(
        "--adapter",
        action="append",
        metavar="PLACE[=STRENGTH]",
        help="a LoRA, of a student or another: a folder or a .safetensors file; may be given several times",
    )
    texts.add_argument(
        "--size",
        type=read_size,
        metavar="SIDE or HEIGHTxWIDTH",
        help="of the picture in pixels, such as 1024 or 832x1216 (default: the model's own)",
    )
    texts.add_argument(
        "--max-tokens", type=int, help=f"length of the longest sequence of a text {_default('max_tokens', defaults)}"
    )
    texts.add_argument("--times", help="trained, or stock: those of a plain diffusers call (default: trained)")
    texts.add_argument("--grid", action="store_true", default=None, help="all pictures on one contact sheet")
    return parser


def _default(name: str, defaults: Mapping[str, Mapping[str, Any]]) -> str:
    """The default of an option in each family that has it, for its help."""
    known = {family: each[name] for family, each in defaults.items() if name in each}
    shown = [f"{family} {'its own' if value is None else value}" for family, value in known.items()]
    return f"(default: {', '.join(shown)})"


def _run(args: argparse.Namespace) -> None:
    parts = {layout.network_part for layout in registry.layouts()}
    folder = student_of(args, parts)
    source, student = read_student(folder)
    layout = _layout(args, source, student)
    drawing: Drawing = layout.drawing()
    _check_options(args, layout, drawing)
    if not student:
        source, student = drawing.said_by_scheduler(folder)
    settings = Settings(drawing.defaults, student, source, args)
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed {args.seed} is not in [0, 2^63): give a smaller whole number")
    _check_outputs(args.output, args.separate)
    _write(drawing.run(args, settings), args.output)


def _layout(args: argparse.Namespace, source: Path, student: dict[str, Any]) -> Layout:
    """The layout of the family that the command line, the student or the model's folder names."""
    if args.family and student.get("family", args.family) != args.family:
        raise UsageError(f"--family {args.family} contradicts {source}, which says {student['family']}: leave it out")
    if Path(args.model).is_file():
        raise UsageError(f"--model {args.model}: {single_file(Path(args.model))}")
    name = args.family or student.get("family")
    found = registry.recognise(Path(args.model)) if name is None else None
    if found is not None:
        return found
    if name is None:
        raise UsageError(
            f"--model {args.model} holds no network of a known family: give the folder of a model, or for one on the "
            f"hub also --family {' or '.join(registry.names())}"
        )
    try:
        return registry.find(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_options(args: argparse.Namespace, layout: Layout, drawing: Drawing) -> None:
    """Refuse an option that has no effect."""
    for option in DRAWING_OPTIONS:
        if option not in (*drawing.options, *drawing.defaults) and getattr(args, option) not in (None, []):
            shown = "a PROMPT" if option == "texts" else f"--{option.replace('_', '-')}"
            raise UsageError(f"{shown} is not for {layout.name}, the family of {args.model}: leave it out")


def _check_outputs(output: Path, separate: Path | None) -> None:
    """Refuse places that cannot be written to, before the model is loaded."""
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
        list_prompts({path: picture.info for path, picture in files.items() if picture.info})
    except OSError as error:
        raise UsageError(f"-o {output}: cannot be written: {error}; give another place") from error


if __name__ == "__main__":
    main()
