"""`dmdr-generate serve`: a page in the browser that draws with a student, and with its teacher beside it.

The page is answered on this machine alone, unless --host names another address: it has no accounts, so everyone who
reaches it can draw. The models stay in memory. One picture is drawn at a time; requests wait in a queue of limited
length.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

from dmdr_models.base.errors import UsageError
from dmdr_models.drawing.stock_pipeline import StockPipeline
from dmdr_models.options import Parser, add_model, add_text_model, prepare
from dmdr_models.studio import Limits, Side, Studio

UNUSED: dict[str, Any] = {
    "classes": None,
    "per_class": None,
    "separate": None,
    "texts": [],
    "prompts": None,
    "grid": None,
}
"""The options of `dmdr-generate` that the page has fields for."""


def main(argv: Sequence[str]) -> None:
    """The program `dmdr-generate serve`."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        if find_spec("gradio") is None:
            raise UsageError('serve needs gradio: pip install "dmdr-models[serve]"')
        studio = open_studio(args)
        from dmdr_models import serve_page

        serve_page.launch(studio, args.host, args.port)
    except UsageError as error:
        parser.error(" ".join(str(error).split()))


def _parser() -> Parser:
    parser = Parser(
        prog="dmdr-generate serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(**UNUSED)
    add_model(parser)
    add_text_model(parser)
    beside = parser.add_argument_group("beside it")
    beside.add_argument("--teacher", metavar="FOLDER", help="a model to draw beside it; it takes memory of its own")
    beside.add_argument("--teacher-steps", type=int, default=28, help="(default: 28)")
    beside.add_argument("--teacher-guidance", type=float, default=1.0, help="default: 1, which is none")
    beside.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="NAME[=CHECKPOINT]",
        help="write this score under every picture; needs dmdr-rewards; may be given several times",
    )
    page = parser.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine alone)")
    page.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    limits = Limits()
    for name, text in (("steps", "steps"), ("side", "pixels of a side"), ("letters", "letters of a prompt"),
                       ("waiting", "requests that wait")):  # fmt: skip
        default = getattr(limits, name)
        page.add_argument(f"--most-{name}", type=int, default=default, help=f"{text}, at most (default: {default})")
    return parser


def open_studio(args: argparse.Namespace) -> Studio:
    """Load the models and the rewards of the command line.

    Raises:
        UsageError: an option is wrong, or a file cannot be used.
    """
    limits = Limits(args.most_steps, args.most_side, args.most_letters, args.most_waiting)
    for name, value in vars(limits).items():
        if value < 1:
            raise UsageError(f"--most-{name} {value} is not at least 1: give 1 or more")
    if not 0 < args.port < 2**16:
        raise UsageError(f"--port {args.port} is not in 1 to 65535: give another number")
    student = args.teacher is not None
    sides = [_side("student" if student else "model", args)]
    takes = prepare(args)[0].takes
    if student:
        changed = {"model": args.teacher, "steps": args.teacher_steps, "guidance": args.teacher_guidance}
        changed |= {"weights": None, "adapter": None, "method": None, "shift": None, "times": None}
        sides.append(_side("teacher", argparse.Namespace(**{**vars(args), **changed})))
    return Studio(sides, takes, limits, dict(map(_reward, args.reward)))


def _side(name: str, args: argparse.Namespace) -> Side:
    _, drawing, settings = prepare(args)
    draw = drawing.open(args, settings, [])
    return Side(name, draw, settings["steps"], isinstance(drawing, StockPipeline))


def _reward(text: str) -> tuple[str, Any]:
    """Load the reward `NAME` or `NAME=CHECKPOINT`. The packages do not need each other, so its name is looked up."""
    name, _, checkpoint = text.partition("=")
    try:
        create = resolve_name("dmdr_rewards:create")
    except ImportError:
        raise UsageError("--reward needs dmdr-rewards: pip install dmdr-rewards") from None
    try:
        return name, create(name, checkpoint or None)
    except (ValueError, OSError) as error:
        raise UsageError(f"--reward {text}: {error}") from error
