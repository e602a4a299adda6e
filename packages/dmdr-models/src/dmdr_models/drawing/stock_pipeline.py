"""`dmdr-generate` for models that take texts: one picture per prompt, by the model's stock diffusers pipeline.

A picture is the same as one that the pipeline makes by itself from the same settings and a CPU generator of the same
seed. Between the steps of "sde", noise is drawn from that generator too; a StableDiffusion3Pipeline alone would draw it
from torch's global one. What a family's pipeline wants otherwise is in its module `stock`.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models.drawing.settings import DTYPES, Settings, UsageError, check_device, read_json
from dmdr_models.folder.contents import PARTS, check_adapter, check_part, check_weights, describe, network_part

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

METHODS = ("euler", "sde")


@dataclass(frozen=True)
class Texts:
    """One family in `dmdr-generate`.

    Attributes:
        stock: how its pipeline is used: `PIPELINE`, `DEFAULTS`, `check`, `said` and `prepare`.
    """

    name: str
    stock: Any
    options = ("texts", "prompts", "adapter", "grid")

    @property
    def defaults(self) -> dict[str, Any]:
        return self.stock.DEFAULTS

    def said_by_scheduler(self, student: Path) -> tuple[Path, dict[str, Any]]:
        """What `scheduler/` in a student's folder says about how to draw from it; nothing if there is none."""
        path = student / "scheduler/scheduler_config.json"
        return path, self.stock.said(read_json(path, "export the student again")) if path.is_file() else {}

    def run(self, args: argparse.Namespace, settings: Settings) -> "dict[Path, Image]":
        """The pictures by the files they belong into."""
        prompts = _prompts(args)
        self._check(settings)
        self._check_files(args, settings)

        check_device(args.device)
        from dmdr_models.drawing.images import grid

        pipeline = self._load(args)
        try:
            pictures = self.draw(pipeline, prompts, seed=args.seed, **settings)
        except ValueError as error:
            raise UsageError(f"{settings.origin('size')}: {error}") from error
        if args.grid:
            return {args.output: grid(pictures, columns=math.ceil(math.sqrt(len(pictures))))}
        names = [args.output]
        if len(prompts) > 1:
            names = [args.output.with_stem(f"{args.output.stem}-{index:05d}") for index in range(len(prompts))]
        return {path: grid(picture[None], columns=1, padding=0) for path, picture in zip(names, pictures, strict=True)}

    def draw(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        guidance: float = 0.0,
        size: int | None = None,
        **sampling: Any,
    ) -> "Tensor":
        """One picture per prompt, `[B, 3, H, W]` in [0, 1] on the CPU; picture i from a generator with seed `seed + i`.

        Args:
            pipeline: the family's; it may get another scheduler.
            guidance: up to 1 is none.
            size: side in pixels (default: the pipeline's own).
            sampling: for the family's `stock.prepare`.

        Raises:
            ValueError: the model cannot draw at this size.
        """
        import torch

        pictures = []
        for index, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + index)
            result = pipeline(
                prompt,
                guidance_scale=guidance,
                height=size,
                width=size,
                generator=generator,
                output_type="pt",
                **self.stock.prepare(pipeline, generator, **sampling),
            )
            pictures.append(result.images.cpu().float())
        return torch.cat(pictures)

    def _check(self, settings: Settings) -> None:
        settings.check_count("steps")
        settings.check_one_of("method", METHODS)
        settings.check_finite("guidance", "0 for no guidance")
        if settings["size"] is not None:
            settings.check_count("size")
        settings.check_one_of("times", ("trained", "stock"))
        self.stock.check(settings)

    def _check_files(self, args: argparse.Namespace, settings: Settings) -> None:
        """All that can be known before weights are read."""
        option = f"--model {args.model}"
        try:
            found = describe(self.name, args.model, own_vae=args.vae is not None, resolution=settings["size"])
            if args.vae is not None:
                option = f"--vae {args.vae}"
                check_part(args.vae, "", PARTS[self.name]["vae"])
            if args.weights is not None:
                option = f"--weights {args.weights}"
                check_weights(self.name, args.weights, found)
            if args.adapter is not None:
                option = f"--adapter {args.adapter}"
                check_adapter(args.adapter, found)
        except (OSError, ValueError) as error:
            if str(error).startswith("resolution"):
                option = settings.origin("size")
            raise UsageError(f"{option}: {error}") from error

    def _load(self, args: argparse.Namespace) -> Any:
        import diffusers
        import torch
        from peft import PeftModel

        from dmdr_models.folder.read_parts import load_network, load_vae

        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # older releases know no other name
        dtype = getattr(torch, DTYPES[args.dtype])
        part = network_part(self.name)
        parts: dict[str, Any] = {}
        option = f"--model {args.model}"
        try:
            if args.weights is not None:
                option = f"--weights {args.weights}"
                network = getattr(diffusers, PARTS[self.name][part][0])
                parts[part] = load_network(network, args.model, part, args.weights, dtype)
            if args.vae is not None:
                option = f"--vae {args.vae}"
                parts["vae"] = load_vae(args.vae, "", dtype)
            option = f"--model {args.model}"
            pipeline = getattr(diffusers, self.stock.PIPELINE).from_pretrained(
                args.model, torch_dtype=dtype, use_safetensors=True, **parts
            )
            if args.adapter is not None:
                option = f"--adapter {args.adapter}"
                PeftModel.from_pretrained(getattr(pipeline, part), args.adapter)  # puts its layers into the network
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{option}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(args.device)


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompts is None) == (not args.texts):
        raise UsageError("prompts are not given, or given twice: give texts, or else --prompts FILE with one per line")
    if args.prompts is None:
        return args.texts
    try:
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--prompts {args.prompts} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts {args.prompts} is not UTF-8: save it as UTF-8 text") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts {args.prompts} holds no prompt: write one per line")
    return prompts
