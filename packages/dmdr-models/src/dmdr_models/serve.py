"""`dmdr-generate serve`: a page in the browser that draws with a student, and with its teacher beside it.

The page is answered on this machine alone, unless --host names another address: it has no accounts, so everyone who
reaches it can draw. The models stay in memory. One picture is drawn at a time; requests wait in a queue of limited
length.
"""

import argparse
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from dmdr_models.base.errors import UsageError
from dmdr_models.drawing.settings import check_device
from dmdr_models.drawing.stock_pipeline import StockPipeline
from dmdr_models.options import Parser, add_model, add_text_model, prepare
from dmdr_models.serve_rewards import add_rewards, check_prompts, load_rewards, read_rewards
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
        check_address(args.host, args.port)
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
    add_rewards(beside)
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
    """Load the rewards and the models of the command line, after everything is checked that needs no weights.

    Raises:
        UsageError: an option is wrong, or a file cannot be used.
    """
    limits = Limits(args.most_steps, args.most_side, args.most_letters, args.most_waiting)
    for name, value in vars(limits).items():
        if value < 1:
            raise UsageError(f"--most-{name} {value} is not at least 1: give 1 or more")
    rewards = read_rewards(args)
    named = {"model": args} if args.teacher is None else {"student": args, "teacher": _teacher(args)}
    prepared = {}
    for name, each in named.items():
        with _naming(name):
            prepared[name] = prepare(each)
    takes = next(iter(prepared.values()))[0].takes
    if any(layout.takes != takes for layout, _, _ in prepared.values()):
        raise UsageError(f"--teacher {args.teacher} does not take {takes}, as the student does: give its own teacher")
    check_prompts(rewards, takes)
    check_device(args.device)
    loaded = load_rewards(rewards, args.device)
    sides = []
    for name, (_, drawing, settings) in prepared.items():
        with _naming(name):
            draw = drawing.open(named[name], settings, [])
        sides.append(Side(name, draw, settings["steps"], isinstance(drawing, StockPipeline)))
    return Studio(sides, takes, limits, loaded)


@contextmanager
def _naming(side: str) -> Iterator[None]:
    """Name --teacher, where an error of the teacher names --model."""
    try:
        yield
    except UsageError as error:
        if side != "teacher":
            raise
        raise UsageError(str(error).replace("--model", "--teacher")) from error


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be answered, before the models are loaded.

    Raises:
        UsageError: the port is taken, or the address is not one of this machine.
    """
    if not 0 < port < 2**16:
        raise UsageError(f"--port {port} is not in 1 to 65535: give another number")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise UsageError(f"--host {host} --port {port}: {error}; give another port or address") from error


def _teacher(args: argparse.Namespace) -> argparse.Namespace:
    """The options with which the teacher is drawn."""
    changed = {"model": args.teacher, "steps": args.teacher_steps, "guidance": args.teacher_guidance}
    own = dict.fromkeys(("weights", "adapter", "method", "shift", "times"))
    return argparse.Namespace(**{**vars(args), **changed, **own})
