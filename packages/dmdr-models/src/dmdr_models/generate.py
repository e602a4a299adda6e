"""`dmdr-generate`: pictures from a model folder, of class labels or of texts.

Of labels it draws one grid with a row per class. Of texts it draws one picture each (several go to OUT-00000.png and so
on), or one contact sheet.

Beside pictures of one text or label each, prompts.jsonl lists what they were drawn of; dmdr-score reads it.

Picture number i, counted from 0, is drawn by itself from its own CPU generator with the seed `seed + i`: it is the same
however many others are drawn, and on the CPU the same to the byte.

A student that dmdr-train exported knows how it is to be sampled: `dmdr.json` in its folder holds any of family, steps,
method, guidance and shift, and for texts size and max_tokens. They take the place of the defaults; options given on the
command line win. If a student for texts lacks that file, its scheduler/ tells the method, and the shift if it has one.

`dmdr-generate serve --model FOLDER` opens a page in the browser instead; see `dmdr-generate serve --help`.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmdr_models import __version__
from dmdr_models.base.errors import UsageError
from dmdr_models.base.secrets import redact_tracebacks
from dmdr_models.drawing.prompts import list_prompts
from dmdr_models.options import Parser, add_model, add_text_model, prepare


def main(argv: Sequence[str] | None = None) -> None:
    """The program `dmdr-generate`."""
    redact_tracebacks()
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["serve"]:
        from dmdr_models import serve

        return serve.main(given[1:])
    parser = _parser()
    args = parser.parse_intermixed_args(given)
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
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add_model(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.png", help="where the picture goes")
    labels = parser.add_argument_group("of class labels")
    labels.add_argument("--classes", help="class labels, separated by commas: 207,360")
    labels.add_argument("--per-class", type=int, help="pictures per class (default: 4)")
    labels.add_argument("--separate", type=Path, metavar="DIR", help="also write every picture: DIR/INDEX-LABEL.png")
    texts = parser.add_argument_group("of texts")
    texts.add_argument("texts", nargs="*", metavar="PROMPT", help="what to draw")
    texts.add_argument("--prompts", metavar="FILE", help="take prompts from here, one per line")
    add_text_model(texts)
    texts.add_argument("--grid", action="store_true", default=None, help="all pictures on one contact sheet")
    return parser


def _run(args: argparse.Namespace) -> None:
    _, drawing, settings = prepare(args)
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed {args.seed} is not in [0, 2^63): give a smaller whole number")
    _check_outputs(args.output, args.separate)
    _write(drawing.run(args, settings), args.output)


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
