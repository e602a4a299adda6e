"""`dmdr-generate` for models that take class labels: one grid with a row per class."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models.drawing.settings import DTYPES, Settings, UsageError, check_count, check_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from dmdr_models.families.protocols import Family

NAME = "sit"
options = ("classes", "per_class", "separate")
defaults: dict[str, Any] = {"steps": 1, "method": "euler", "guidance": 1.0, "shift": 1.0}
METHODS = ("euler", "heun", "sde")


def said_by_scheduler(student: Path) -> tuple[Path, dict[str, Any]]:
    """Nothing: no pipeline of diffusers has such a model, so its students have no scheduler."""
    return student, {}


def run(args: argparse.Namespace, settings: Settings) -> "dict[Path, Image]":
    """The pictures by the files they belong into."""
    settings.check_count("steps")
    settings.check_one_of("method", METHODS)
    settings.check_finite("guidance", "1 for no guidance")
    settings.check_positive("shift", "1 for no shift")
    labels = _labels(args.classes)
    columns = 4 if args.per_class is None else args.per_class
    check_count(f"--per-class {columns}", columns)

    check_device(args.device)
    from dmdr_models.drawing.images import grid

    family, network = _load(args, labels)
    prompts = [label for label in labels for _ in range(columns)]
    pictures = draw(family, network, prompts, seed=args.seed, **settings)
    files = {args.output: grid(pictures, columns)}
    if args.separate:
        for index, (label, picture) in enumerate(zip(prompts, pictures, strict=True)):
            files[args.separate / f"{index:05d}-{label}.png"] = grid(picture[None], columns=1, padding=0)
    return files


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

    from dmdr_models.drawing.sampling import sample

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


def _labels(text: str | None) -> list[int]:
    if text is None:
        raise UsageError("--classes is not given: give labels such as 207,360")
    try:
        return [int(label) for label in text.split(",")]
    except ValueError:
        raise UsageError(f"--classes {text!r} is not a list of numbers: give labels such as 207,360") from None


def _load(args: argparse.Namespace, labels: list[int]) -> tuple["Family", "nn.Module"]:
    from dmdr_models.families.protocols import load

    at = f"--model {args.model}" if args.vae is None else f"--model {args.model} --vae {args.vae}"
    try:
        family = load(NAME, args.model, vae=args.vae).to(args.device)
        assert family.vae  # opened before anyone waits for a picture
    except (ValueError, OSError) as error:
        raise UsageError(f"{at}: {error}: give the folder of a {NAME} model") from error
    try:
        family.condition(labels)
    except ValueError as error:
        raise UsageError(f"--classes {args.classes}: {error}") from error
    option = f"--weights {args.weights}" if args.weights else at
    try:
        network = family.load_network(args.weights)
    except (ValueError, OSError) as error:
        raise UsageError(f"{option}: {error}: give a folder with a {NAME} network") from error
    import torch

    return family, network.to(args.device, getattr(torch, DTYPES[args.dtype]))
