"""The options of `dmdr-generate` and `dmdr-generate serve` that name a model and say how to draw. Imports no torch."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from dmdr_models import registry
from dmdr_models.base.errors import UsageError
from dmdr_models.base.picture_size import read_size
from dmdr_models.base.secrets import redacted
from dmdr_models.drawing.interface import Drawing
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


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model and say how to draw from it."""
    defaults = _defaults()
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
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the model (default: fp32)")


def add_text_model(texts: Any) -> None:
    """Add the options that only models of texts take, to a parser or a group of one."""
    defaults = _defaults()
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


def _defaults() -> dict[str, Mapping[str, Any]]:
    return {layout.name: layout.drawing().defaults for layout in registry.layouts()}


def _default(name: str, defaults: Mapping[str, Mapping[str, Any]]) -> str:
    """The default of an option in each family that has it, for its help."""
    known = {family: each[name] for family, each in defaults.items() if name in each}
    shown = [f"{family} {'its own' if value is None else value}" for family, value in known.items()]
    return f"(default: {', '.join(shown)})"


def prepare(args: argparse.Namespace) -> tuple[Layout, Drawing, Settings]:
    """The layout of the model on the command line, how it draws, and the settings in force.

    Raises:
        UsageError: an option is wrong, or has no effect.
    """
    parts = {layout.network_part for layout in registry.layouts()}
    folder = student_of(args, parts)
    source, student = read_student(folder)
    layout = _layout(args, source, student)
    drawing: Drawing = layout.drawing()
    _check_options(args, layout, drawing)
    if not student:
        source, student = drawing.said_by_scheduler(folder)
    return layout, drawing, Settings(drawing.defaults, student, source, args)


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
