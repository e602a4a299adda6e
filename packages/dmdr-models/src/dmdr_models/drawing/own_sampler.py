"""`dmdr-generate` with the sampler of this package: it draws with any family. Imports no torch until it draws."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models.base.errors import SizeError, UsageError
from dmdr_models.drawing.prompts import read_labels, read_texts
from dmdr_models.drawing.settings import DTYPES, Settings, check_count, check_device
from dmdr_models.folder.layout import Layout

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from dmdr_models.families.protocols import Family

METHODS = ("euler", "heun", "sde")


class OwnSampler:
    """Of class labels it draws one grid with a row per class, of texts one picture each.

    See `dmdr_models.drawing.interface.Drawing`.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.labels = layout.takes == "labels"
        self.options = ("classes", "per_class", "separate") if self.labels else ("texts", "prompts", "grid")
        self.defaults: dict[str, Any] = {"steps": 1, "method": "euler", "guidance": 1.0, "shift": None}
        if not self.labels:
            self.defaults["size"] = None
        if layout.max_tokens is not None:
            self.defaults["max_tokens"] = layout.max_tokens

    def said_by_scheduler(self, student: Path) -> tuple[Path, dict[str, Any]]:
        """Nothing: the students of such a family have no scheduler."""
        return student, {}

    def run(self, args: argparse.Namespace, settings: Settings) -> "dict[Path, Image]":
        """See `dmdr_models.drawing.interface.Drawing.run`."""
        self._check(settings)
        columns = 4 if args.per_class is None else args.per_class
        check_count(f"--per-class {columns}", columns)
        asked: list[Any] = read_labels(args.classes) if self.labels else read_texts(args)
        prompts = [label for label in asked for _ in range(columns)] if self.labels else asked
        pictures = self.open(args, settings, asked)(prompts, seed=args.seed)
        from dmdr_models.drawing import picture_files

        if self.labels:
            return picture_files.by_label(args, prompts, columns, pictures)
        return picture_files.by_text(args, prompts, pictures)

    def open(self, args: argparse.Namespace, settings: Settings, prompts: Sequence[Any]) -> "Callable[..., Tensor]":
        """See `dmdr_models.drawing.interface.Drawing.open`. The pictures have the size that it is opened with."""
        self._check(settings)
        check_device(args.device)
        family = self._open(args, settings, prompts)
        network = self._network(family, args)
        sampling = {name: settings[name] for name in ("steps", "method", "guidance", "shift")}
        return lambda prompts, seed=0, **changed: draw(family, network, prompts, seed=seed, **{**sampling, **changed})

    def _check(self, settings: Settings) -> None:
        settings.check_count("steps")
        settings.check_one_of("method", METHODS)
        settings.check_finite("guidance", "1 for no guidance")
        if settings["shift"] is not None:
            settings.check_positive("shift", "1 for no shift")
        if "size" in settings:
            settings.check_size()
        if settings.get("max_tokens") is not None:
            settings.check_count("max_tokens")

    def _open(self, args: argparse.Namespace, settings: Settings, prompts: Sequence[Any]) -> "Family":
        from dmdr_core import FlowMatching

        at = f"--model {args.model}" if args.vae is None else f"--model {args.model} --vae {args.vae}"
        options = {"vae": args.vae, "resolution": settings.get("size"), "max_tokens": settings.get("max_tokens")}
        try:
            family = self.layout.open(args.model, **options).to(args.device)
            family.open_decoder()  # an error in it comes before the pictures are drawn
        except SizeError as error:
            raise UsageError(f"{settings.origin('size')}: {error}") from error
        except (ValueError, OSError) as error:
            raise UsageError(f"{at}: {error}: give the folder of a {self.layout.name} model") from error
        try:
            if prompts:
                family.condition(prompts)
        except ValueError as error:
            raise UsageError(f"--classes {args.classes}: {error}" if self.labels else f"prompts: {error}") from error
        try:
            family.grid(settings["steps"], family.shift if settings["shift"] is None else settings["shift"])
        except ValueError as error:
            raise UsageError(f"{settings.origin('shift')}: {error}") from error
        if settings["method"] == "heun" and not isinstance(family.process, FlowMatching):
            raise UsageError(f"{settings.origin('method')} needs a flow-matching model: give euler or sde")
        return family

    def _network(self, family: "Family", args: argparse.Namespace) -> "nn.Module":
        import torch

        option = f"--weights {args.weights}" if args.weights else f"--model {args.model}"
        try:
            network = family.load_network(args.weights)
        except (ValueError, OSError) as error:
            raise UsageError(f"{option}: {error}: give a folder with a {self.layout.name} network") from error
        # diffusers' own `to` warns about layers to keep in float32, even if there are none.
        return torch.nn.Module.to(network, args.device, getattr(torch, DTYPES[args.dtype]))


def draw(
    family: "Family",
    network: "nn.Module",
    prompts: Sequence[Any],
    *,
    seed: int = 0,
    steps: int = 1,
    method: str = "euler",
    guidance: float = 1.0,
    shift: float | None = None,
) -> "Tensor":
    """One picture per prompt, `[B, 3, H, W]` in [0, 1] on the CPU; picture i from a generator with seed `seed + i`.

    The network and the family are on one device already. The other arguments are those of `dmdr_models.sample`.

    Args:
        shift: of the step grid (default: the family's own).

    Raises:
        ValueError: a prompt that the family does not know, or as in `dmdr_models.sample`.
    """
    import torch
    from dmdr_core import randn

    from dmdr_models.drawing.sampling import sample

    family.condition(prompts)
    shift = family.shift if shift is None else shift
    device = next(network.parameters()).device
    pictures = []
    for index, prompt in enumerate(prompts):
        # Alone: in a batch, a picture would change in the last bits with the number of its neighbours.
        generator = [torch.Generator().manual_seed(seed + index)]
        noise = randn((1, *family.latent_shape(*family.size)), generator, device=device)
        latent = sample(family, network, family.condition([prompt]), noise, steps, method, guidance, shift, generator)
        with torch.no_grad():
            pictures.append(family.decode(latent).cpu())
    return torch.cat(pictures)
