"""`dmdr-generate`: pictures from a model folder, as one grid with a row per class.

Picture number i, counted row by row from 0, is drawn alone from its own generator with the seed `seed + i`: it is the
same however many others are drawn, and on the CPU the same to the byte.

A student that dmdr-train exported knows how it wants to be sampled: `dmdr.json` beside its `transformer/` holds any of
family, steps, method, guidance and shift. They take the place of the defaults; options given on the command line win.
"""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dmdr_models.family import Family

STUDENT_FILE = "dmdr.json"
DEFAULTS: dict[str, Any] = {"steps": 1, "method": "euler", "guidance": 1.0, "shift": 1.0}
METHODS = ("euler", "heun", "sde")


class UsageError(ValueError):
    """The user's; the message is one line with the option, its value and the fix."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _run(args)
    except UsageError as error:
        parser.error(" ".join(str(error).split()))


def draw(
    family: "Family",
    network: "nn.Module",
    prompts: Sequence[Any],
    *,
    seed: int = 0,
    steps: int = 1,
    method: str = "euler",
    guidance: float = 1.0,
    shift: float = 1.0,
) -> "Tensor":
    """One picture per prompt, `[B, 3, H, W]` in [0, 1] on the CPU; picture i from a generator with seed `seed + i`.

    The network and the family are on one device already. The other arguments are those of `dmdr_models.sample`.

    Raises:
        ValueError: a prompt that the family does not know, or as in `dmdr_models.sample`.
    """
    import torch
    from dmdr_core import randn

    from dmdr_models.sampling import sample

    family.condition(prompts)
    device = next(network.parameters()).device
    pictures = []
    for index, prompt in enumerate(prompts):
        # Alone: in a batch, a picture would change in the last bits with the number of its neighbours.
        generator = [torch.Generator().manual_seed(seed + index)]
        noise = randn((1, *family.latent_shape), generator, device=device)
        latent = sample(family, network, family.condition([prompt]), noise, steps, method, guidance, shift, generator)
        with torch.no_grad():
            pictures.append(family.decode(latent).cpu())
    return torch.cat(pictures)


def _parser() -> Parser:
    parser = Parser(
        prog="dmdr-generate",
        description=__doc__.split("\n", 1)[1].strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--family", help="the model's family: sit (default: what an exported student says)")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the model: transformer/ and vae/")
    parser.add_argument("--weights", metavar="FOLDER", help="take the network from here, such as a student's folder")
    parser.add_argument("--vae", metavar="FOLDER", help="take the decoder from here instead of MODEL/vae")
    parser.add_argument("--classes", required=True, help="class labels, separated by commas: 207,360")
    parser.add_argument("--per-class", type=int, default=4, help="pictures per class (default: 4)")
    parser.add_argument("--steps", type=int, help="(default: 1, or what an exported student says; also the next three)")
    parser.add_argument("--method", help=f"{', '.join(METHODS)} (default: euler)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: 1, which is none)")
    parser.add_argument("--shift", type=float, help="of the time grid towards noise (default: 1, which is none)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the network (default: fp32)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="GRID.png", help="where the grid goes")
    parser.add_argument("--separate", type=Path, metavar="DIR", help="also write every picture: DIR/INDEX-LABEL.png")
    return parser


def _run(args: argparse.Namespace) -> None:
    settings = _settings(args)
    name = settings.pop("family")
    labels = _labels(args.classes)
    _check_count("--per-class", args.per_class)
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed {args.seed} is not in [0, 2^63): give a smaller whole number")
    _check_outputs(args.output, args.separate)

    from dmdr_models.images import grid, save_png

    family, network = _load(args, name, labels)
    prompts = [label for label in labels for _ in range(args.per_class)]
    pictures = draw(family, network, prompts, seed=args.seed, **settings)
    sheet = grid(pictures, columns=args.per_class)
    try:
        if args.separate:
            args.separate.mkdir(exist_ok=True)
            for index, (label, picture) in enumerate(zip(prompts, pictures, strict=True)):
                save_png(grid(picture[None], columns=1, padding=0), args.separate / f"{index:05d}-{label}.png")
        save_png(sheet, args.output)
    except OSError as error:
        raise UsageError(f"-o {args.output}: cannot be written: {error}; give another place") from error
    print(args.output)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Command line over student over defaults."""
    source, student = _student(Path(args.weights or args.model))
    if args.family and student.get("family", args.family) != args.family:
        raise UsageError(f"--family {args.family} contradicts {source}, which says {student['family']}: leave it out")
    given = {name: getattr(args, name) for name in ("family", *DEFAULTS) if getattr(args, name) is not None}
    settings = {**DEFAULTS, **student, **given}

    def origin(key: str) -> str:
        return (
            f"--{key} {settings[key]}" if key in given or key not in student else f"{key} {settings[key]} in {source}"
        )

    if "family" not in settings:
        raise UsageError("--family is not given and the model is no exported student that names it: give --family sit")
    _check_count(origin("steps"), settings["steps"])
    if settings["method"] not in METHODS:
        raise UsageError(f"{origin('method')} is unknown: give one of {', '.join(METHODS)}")
    if not _is_finite(settings["guidance"]):
        raise UsageError(f"{origin('guidance')} is not a finite number: give 1 for no guidance")
    if not _is_finite(settings["shift"]) or settings["shift"] <= 0:
        raise UsageError(f"{origin('shift')} is not a positive number: give 1 for no shift")
    return settings


def _student(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that an export leaves beside `transformer/`, and what it holds; nothing if there is none."""
    path = (folder.parent if folder.name == "transformer" else folder) / STUDENT_FILE
    if not path.is_file():
        return path, {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}; export the student again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a JSON object: export the student again")
    return path, {key: content[key] for key in ("family", *DEFAULTS) if key in content}


def _labels(text: str) -> list[int]:
    try:
        return [int(label) for label in text.split(",")]
    except ValueError:
        raise UsageError(f"--classes {text!r} is not a list of numbers: give labels such as 207,360") from None


def _check_count(name: str, value: Any) -> None:
    shown = name if str(value) in name else f"{name} {value}"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{shown} is not a whole number of at least 1: give 1 or more")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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


def _load(args: argparse.Namespace, name: str, labels: list[int]) -> tuple["Family", "nn.Module"]:
    import torch

    from dmdr_models.family import load

    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device} is not available: give cpu ({str(error).splitlines()[0]})") from error
    options = {} if args.vae is None else {"vae": args.vae}
    at = f"--model {args.model}" if args.vae is None else f"--model {args.model} --vae {args.vae}"
    try:
        family = load(name, args.model, **options).to(args.device)
    except (ValueError, OSError) as error:
        raise UsageError(f"{at}: {error}: give the folder of a {name} model") from error
    try:
        family.condition(labels)
    except ValueError as error:
        raise UsageError(f"--classes {args.classes}: {error}") from error
    option = f"--weights {args.weights}" if args.weights else at
    try:
        network = family.load_network(args.weights)
    except (ValueError, OSError) as error:
        raise UsageError(f"{option}: {error}: give a folder with a {name} network") from error
    network = network.to(args.device)
    return family, network.bfloat16() if args.dtype == "bf16" else network


if __name__ == "__main__":
    main()
