"""`dmdr-generate` with a model's stock diffusers pipeline: one picture per text. Imports no torch until it draws.

A picture is the same as one that the pipeline makes by itself from the same settings and a CPU generator of the same
seed. Between the steps of "sde", noise is drawn from that generator too; some pipelines would draw it from torch's
global one.
"""

import argparse
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models.base.errors import SizeError, UsageError
from dmdr_models.base.picture_size import Resolution, as_size
from dmdr_models.drawing.prompts import read_texts
from dmdr_models.drawing.settings import DTYPES, Settings, adapters, check_device, read_object
from dmdr_models.folder.adapter_files import check_adapter, step_folders
from dmdr_models.folder.checks import check_weights
from dmdr_models.folder.contents import check_vae, describe
from dmdr_models.folder.layout import Layout

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

METHODS = ("euler", "sde")


class StepSwitch:
    """Switches a network between the LoRAs of a student's steps while a pipeline draws.

    Args:
        network: with LoRAs of `dmdr_models.networks.applied_loras.add_loras`.
        at_step: the step that each LoRA is for; None for all steps.
    """

    def __init__(self, network: Any, at_step: Sequence[int | None]):
        self.network, self.at_step = network, at_step

    def begin(self, steps: int) -> dict[str, Any]:
        """Take the LoRAs of the first step; returns what the pipeline is called with to take those of the others.

        Raises:
            ValueError: there is not one LoRA for each of the steps.
        """
        own = len({at for at in self.at_step if at is not None})
        if steps != own:
            raise ValueError(f"the student has a LoRA for each of {own} steps: draw with {own} steps, not {steps}")
        self.take(0)
        return {"callback_on_step_end": self.after}

    def after(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline calls after each step."""
        self.take(step + 1)
        return tensors

    def take(self, step: int) -> None:
        from dmdr_models.networks.applied_loras import activate

        activate(self.network, [index for index, at in enumerate(self.at_step) if at in (None, step)])


def check_step_loras(args: argparse.Namespace, settings: Settings) -> None:
    """Check that there are as many steps as a student has LoRAs for them.

    Raises:
        UsageError: there are not.
    """
    for place, _ in adapters(args.adapter):
        count = len(step_folders(place))
        if count not in (0, settings["steps"]):
            raise UsageError(
                f"{settings.origin('steps')} does not go with --adapter {place}, which has LoRAs for {count} steps: "
                f"give {count}"
            )


class StockPipeline(ABC):
    """One family's pipeline; see `dmdr_models.drawing.interface.Drawing`.

    Attributes:
        pipeline: the name of its class in diffusers.
    """

    pipeline: str
    defaults: Mapping[str, Any]
    options = ("texts", "prompts", "adapter", "grid")

    def __init__(self, layout: Layout):
        self.layout = layout
        self.switch: StepSwitch | None = None

    @abstractmethod
    def check(self, settings: Settings) -> None:
        """Check the settings that only this family restricts.

        Raises:
            UsageError: for the first that is wrong.
        """

    @abstractmethod
    def said(self, scheduler: dict[str, Any]) -> dict[str, Any]:
        """The settings that a student's scheduler config tells."""

    @abstractmethod
    def prepare(self, pipeline: Any, generator: Any, **sampling: Any) -> dict[str, Any]:
        """Give the pipeline its scheduler, and return the arguments to call it with.

        Args:
            generator: of the noise between the steps of "sde".
            sampling: the settings other than guidance and size.
        """

    def said_by_scheduler(self, student: Path) -> tuple[Path, dict[str, Any]]:
        """See `dmdr_models.drawing.interface.Drawing.said_by_scheduler`."""
        path = student / "scheduler/scheduler_config.json"
        return path, self.said(read_object(path, "export the student again")) if path.is_file() else {}

    def run(self, args: argparse.Namespace, settings: Settings) -> "dict[Path, Image]":
        """See `dmdr_models.drawing.interface.Drawing.run`."""
        prompts = read_texts(args)
        draw = self.open(args, settings, prompts)
        from dmdr_models.drawing.picture_files import by_text

        try:
            pictures = draw(prompts, seed=args.seed)
        except ValueError as error:
            raise UsageError(f"{settings.origin('size')}: {error}") from error
        return by_text(args, prompts, pictures)

    def open(self, args: argparse.Namespace, settings: Settings, prompts: Sequence[str]) -> "Callable[..., Tensor]":
        """See `dmdr_models.drawing.interface.Drawing.open`."""
        self._check(settings)
        check_step_loras(args, settings)
        self._check_files(args, settings)
        check_device(args.device)
        pipeline = self._load(args)
        return lambda prompts, seed=0, **changed: self.draw(pipeline, prompts, seed=seed, **{**settings, **changed})

    def draw(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        guidance: float = 0.0,
        size: Resolution | None = None,
        **sampling: Any,
    ) -> "Tensor":
        """One picture per prompt, `[B, 3, H, W]` in [0, 1] on the CPU; picture i from a generator with seed `seed + i`.

        Args:
            pipeline: an instance of the family's pipeline; it may get another scheduler.
            guidance: classifier-free guidance scale; up to 1 is none.
            size: side in pixels, or (height, width) (default: the pipeline's own).
            sampling: for `prepare`.

        Raises:
            ValueError: the model cannot draw at this size.
        """
        import torch

        height, width = (None, None) if size is None else as_size(size)
        pictures = []
        for index, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(seed + index)
            switching = {} if self.switch is None else self.switch.begin(sampling["steps"])
            result = pipeline(
                prompt,
                guidance_scale=guidance,
                height=height,
                width=width,
                generator=generator,
                output_type="pt",
                **switching,
                **self.prepare(pipeline, generator, **sampling),
            )
            pictures.append(result.images.cpu().float())
        return torch.cat(pictures)

    def _check(self, settings: Settings) -> None:
        settings.check_count("steps")
        settings.check_one_of("method", METHODS)
        settings.check_finite("guidance", "0 for no guidance")
        settings.check_size()
        settings.check_one_of("times", ("trained", "stock"))
        self.check(settings)

    def _check_files(self, args: argparse.Namespace, settings: Settings) -> None:
        """Check what can be known before weights are read."""
        option = f"--model {args.model}"
        sizes = [] if settings["size"] is None else [as_size(settings["size"])]
        try:
            own_vae = args.vae is not None
            found = describe(self.layout, args.model, own_vae, sizes=sizes, quantised=True)
            layers = None if found is None else found.layers
            if args.vae is not None:
                option = f"--vae {args.vae}"
                check_vae(self.layout, args.vae)
            if args.weights is not None:
                option = f"--weights {args.weights}"
                check_weights(self.layout, args.weights, layers)
            for place, _ in adapters(args.adapter):
                option = f"--adapter {place}"
                for each in step_folders(place) or [place]:
                    check_adapter(each, layers, self.layout.network_part)
        except (OSError, ValueError) as error:
            if isinstance(error, SizeError):
                option = settings.origin("size")
            raise UsageError(f"{option}: {error}") from error

    def _check_configs(self, args: argparse.Namespace) -> None:
        """The family's own checks: of folders here they are done already, of names on the hub not yet."""
        from diffusers import AutoencoderKL, DDPMScheduler

        from dmdr_models.folder.read_parts import part_config

        vae = (args.model, "vae") if args.vae is None else (args.vae, "")
        places: dict[str, Any] = {"scheduler": (DDPMScheduler, args.model, "scheduler"), "vae": (AutoencoderKL, *vae)}
        for part in self.layout.checks.keys() & places.keys():
            kind, path, folder = places[part]
            self.layout.check_config(part, part_config(kind, path, folder, self.layout.parts[part]))

    def _load(self, args: argparse.Namespace) -> Any:
        import diffusers
        import torch

        from dmdr_models.folder.read_parts import load_network, load_vae
        from dmdr_models.networks.applied_loras import add_loras
        from dmdr_models.networks.lora_files import read_lora

        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # older releases know no other name
        dtype = getattr(torch, DTYPES[args.dtype])
        part, network = self.layout.network_part, getattr(diffusers, self.layout.network_classes[0])
        parts: dict[str, Any] = {}
        loras: list[tuple[Any, float]] = []
        at_step: list[int | None] = []
        option = f"--model {args.model}"
        try:
            self._check_configs(args)
            if args.weights is not None:
                option = f"--weights {args.weights}"
            parts[part] = load_network(network, args.model, part, args.weights, dtype)
            for place, strength in adapters(args.adapter):
                option = f"--adapter {place}"
                folders = step_folders(place)
                for each in folders or [place]:
                    lora = read_lora(each, self.layout, getattr(diffusers, self.pipeline), parts[part].config)
                    lora.check(parts[part])
                    loras.append((lora, strength))
                at_step += range(len(folders)) if folders else [None]
            add_loras(parts[part], loras)
            if any(step is not None for step in at_step):
                self.switch = StepSwitch(parts[part], at_step)
            if args.vae is not None:
                option = f"--vae {args.vae}"
                parts["vae"] = load_vae(args.vae, "", dtype)
            option = f"--model {args.model}"
            pipeline = self._open(args.model, dtype, parts)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise UsageError(f"{option}: {error}") from error
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(args.device)

    def _open(self, path: str, dtype: Any, parts: dict[str, Any]) -> Any:
        """The pipeline with the given parts, and with those of the model that are not given."""
        import diffusers

        from dmdr_models.folder.read_parts import load_text_encoder, load_vae

        if "vae" not in parts:
            parts["vae"] = load_vae(path, "vae", dtype)
        lacking = self.layout.lacking(path)
        for encoder, classes in self.layout.text_encoders.items():
            if encoder in lacking:
                parts |= {encoder: None, encoder.replace("text_encoder", "tokenizer"): None}
            else:
                parts[encoder] = load_text_encoder(path, encoder, classes, dtype)
        return getattr(diffusers, self.pipeline).from_pretrained(path, torch_dtype=dtype, use_safetensors=True, **parts)
