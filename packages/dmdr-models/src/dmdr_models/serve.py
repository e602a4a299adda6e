"""`dmdr-generate serve`: a page in the browser that draws with a student, and with its teacher beside it.

The page is answered on this machine alone, unless --host names another address: it has no accounts, so everyone who
reaches it can draw. The models stay in memory. One picture is drawn at a time; requests wait in a queue of limited
length.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from dmdr_models.base.errors import UsageError
from dmdr_models.drawing.stock_pipeline import StockPipeline
from dmdr_models.options import Parser, add_model, add_text_model, prepare

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

UNUSED = {"classes": None, "per_class": None, "separate": None, "texts": [], "prompts": None, "grid": None}
"""The options of `dmdr-generate` that the page has fields for."""


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for: steps, pixels of a side, letters of a prompt, and requests that wait."""

    steps: int = 50
    side: int = 1024
    letters: int = 1000
    waiting: int = 8


@dataclass(frozen=True)
class Side:
    """A model of the page.

    Attributes:
        draw: what `Drawing.open` returned.
        steps: unless the request says otherwise.
        sized: whether `draw` takes a size.
    """

    name: str
    draw: "Callable[..., Tensor]"
    steps: int
    sized: bool


@dataclass(frozen=True)
class Studio:
    """The models and rewards behind the page; it knows nothing of the page itself.

    Attributes:
        takes: "labels" or "texts", as `Layout.takes`.
        rewards: by name; each has `score(images, prompts)`, as the rewards of dmdr-rewards.
    """

    sides: Sequence[Side]
    takes: str
    limits: Limits = Limits()
    rewards: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, text: str, seed: int, steps: Sequence[int], size: int = 0) -> list[tuple["Image", str]]:
        """Draw one picture with each model, from the same seed.

        Args:
            text: the prompt, or a class label.
            steps: of each model.
            size: the side in pixels; 0 is the models' own size.

        Returns:
            For each model its picture, and a line with its name, steps, seconds and scores.

        Raises:
            UsageError: the request is beyond the limits, or a model cannot take it.
        """
        prompt = self._checked(text, seed, steps, size)
        answers = []
        for side, count in zip(self.sides, steps, strict=True):
            began = time.perf_counter()
            changed: dict[str, Any] = {"steps": count}
            if size:
                changed["size"] = size
            try:
                pictures = side.draw([prompt], seed=seed, **changed)
            except ValueError as error:
                raise UsageError(f"{side.name}: {error}") from error
            said = f"{side.name} · {count} step{'s' * (count > 1)} · {time.perf_counter() - began:.1f} s"
            answers.append((_image(pictures), " · ".join([said, *self._scores(pictures, prompt)])))
        return answers

    def _checked(self, text: str, seed: int, steps: Sequence[int], size: int) -> Any:
        limits, text = self.limits, text.strip()
        if not text:
            raise UsageError("the prompt is empty: write what to draw")
        if len(text) > limits.letters:
            raise UsageError(f"the prompt has {len(text)} letters: give at most {limits.letters}")
        if not _is_whole(seed, 0, 2**63 - 1):
            raise UsageError(f"seed {seed} is not in [0, 2^63): give a smaller whole number")
        for count in steps:
            if not _is_whole(count, 1, limits.steps):
                raise UsageError(f"steps {count} is not in 1 to {limits.steps}: give another number")
        if size and not all(side.sized for side in self.sides):
            raise UsageError("the models draw pictures of one size: leave the size at 0")
        if size and not _is_whole(size, 16, limits.side):
            raise UsageError(f"size {size} is not in 16 to {limits.side}: give another number, or 0")
        if self.takes == "texts":
            return text
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{text!r} is no class label: give a number such as 207") from None

    def _scores(self, pictures: "Tensor", prompt: Any) -> list[str]:
        found = []
        for name, reward in self.rewards.items():
            try:
                found.append(f"{name} {float(reward.score(pictures, [prompt])[0]):.3f}")
            except (ValueError, OSError) as error:
                raise UsageError(f"{name}: {error}") from error
        return found


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


def _image(pictures: "Tensor") -> "Image":
    from dmdr_models.drawing.images import grid

    return grid(pictures, columns=1, padding=0)


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
