"""`dmdr-generate` for models that take texts: one picture per prompt, by the model's stock diffusers pipeline.

A picture is the same as one that the pipeline makes by itself from the same settings and a CPU generator of the same
seed. Between the steps of "sde", noise is drawn from that generator too; the pipeline alone would draw it from torch's
global one.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models.describe import PARTS, check_adapter, check_part, describe
from dmdr_models.generate_options import Settings, UsageError, check_device, read_json
from dmdr_models.sd3 import T_END

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

OPTIONS = ("texts", "prompts", "adapter", "size", "max_tokens", "times", "grid")
DEFAULTS: dict[str, Any] = {
    "steps": 4,
    "method": "euler",
    "guidance": 0.0,
    "shift": None,
    "size": None,
    "max_tokens": 128,
    "times": "trained",
}
METHODS = ("euler", "sde")


def run(name: str, args: argparse.Namespace, settings: Settings) -> "dict[Path, Image]":
    """The pictures of the family `name` by the files they belong into."""
    prompts = _prompts(args)
    _check(settings)
    _check_folders(name, args, settings)

    check_device(args.device)
    from dmdr_models.images import grid

    pipeline = _load(args)
    try:
        pictures = draw(pipeline, prompts, seed=args.seed, **settings)
    except ValueError as error:
        raise UsageError(f"{settings.origin('size')}: {error}") from error
    if args.grid:
        return {args.output: grid(pictures, columns=math.ceil(math.sqrt(len(pictures))))}
    names = [args.output]
    if len(prompts) > 1:
        names = [args.output.with_stem(f"{args.output.stem}-{index:05d}") for index in range(len(prompts))]
    return {path: grid(picture[None], columns=1, padding=0) for path, picture in zip(names, pictures, strict=True)}


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    steps: int = 4,
    method: str = "euler",
    guidance: float = 0.0,
    shift: float | None = None,
    size: int | None = None,
    max_tokens: int = 128,
    times: str = "trained",
) -> "Tensor":
    """One picture per prompt, `[B, 3, H, W]` in [0, 1] on the CPU; picture i from a generator with seed `seed + i`.

    Args:
        pipeline: a StableDiffusion3Pipeline; it gets another scheduler.
        method: "euler", or "sde", which renoises between steps.
        guidance: up to 1 is none.
        shift: of the times towards noise (default: the pipeline's own).
        size: side in pixels (default: the pipeline's own).
        times: "trained" are those of `StepGrid(steps, shift, t_end=0.001)`; "stock" those of a plain call.

    Raises:
        ValueError: the model cannot draw at this size.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    changed = {"stochastic_sampling": method == "sde", **({} if shift is None else {"shift": shift})}
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **changed)
    step = scheduler.step
    pipeline.register_modules(scheduler=scheduler)
    if times == "trained":
        visited: dict[str, Any] = {"sigmas": torch.linspace(1, T_END, steps + 1)[:-1].tolist()}
    else:
        visited = {"num_inference_steps": steps}
    pictures = []
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed + index)
        scheduler.step = partial(step, generator=generator)
        result = pipeline(
            prompt,
            guidance_scale=guidance,
            height=size,
            width=size,
            max_sequence_length=max_tokens,
            generator=generator,
            output_type="pt",
            **visited,
        )
        pictures.append(result.images.cpu().float())
    return torch.cat(pictures)


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


def _check(settings: Settings) -> None:
    settings.check_count("steps")
    settings.check_one_of("method", METHODS)
    settings.check_finite("guidance", "0 for no guidance")
    if settings["shift"] is not None:
        settings.check_positive("shift", "1 for no shift")
    if settings["size"] is not None:
        settings.check_count("size")
    settings.check_count("max_tokens")
    if settings["max_tokens"] > 512:
        raise UsageError(f"{settings.origin('max_tokens')} is more than the pipeline takes: give at most 512")
    settings.check_one_of("times", ("trained", "stock"))


def said_by_scheduler(folder: Path) -> tuple[Path, dict[str, Any]]:
    """What `scheduler/` in a student's folder says about how to draw from it; nothing if there is none."""
    path = folder / "scheduler/scheduler_config.json"
    if not path.is_file():
        return path, {}
    config = read_json(path, "export the student again")
    said = {"method": "sde" if config.get("stochastic_sampling") else "euler"}
    return path, said | ({"shift": config["shift"]} if "shift" in config else {})


def _check_folders(name: str, args: argparse.Namespace, settings: Settings) -> None:
    """All that can be known before weights are read."""
    option = f"--model {args.model}"
    try:
        found = describe(name, args.model, own_vae=args.vae is not None, resolution=settings["size"])
        if args.vae is not None:
            option = f"--vae {args.vae}"
            check_part(args.vae, "", PARTS[name]["vae"])
        if args.weights is not None:
            option = f"--weights {args.weights}"
            part = "transformer" if (Path(args.weights) / "transformer").is_dir() else ""
            check_part(args.weights, part, PARTS[name]["transformer"])
        if args.adapter is not None:
            option = f"--adapter {args.adapter}"
            check_adapter(args.adapter, found)
    except (OSError, ValueError) as error:
        if str(error).startswith("resolution"):
            option = settings.origin("size")
        raise UsageError(f"{option}: {error}") from error


def _load(args: argparse.Namespace) -> Any:
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from peft import PeftModel

    from dmdr_models.parts import load_network

    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # older releases know no other name
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    parts: dict[str, Any] = {}
    option = f"--model {args.model}"
    try:
        if args.weights is not None:
            option = f"--weights {args.weights}"
            parts["transformer"] = load_network(SD3Transformer2DModel, args.model, "transformer", args.weights, dtype)
        if args.vae is not None:
            option = f"--vae {args.vae}"
            parts["vae"] = AutoencoderKL.from_pretrained(args.vae, torch_dtype=dtype, use_safetensors=True)
        option = f"--model {args.model}"
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            args.model, torch_dtype=dtype, use_safetensors=True, **parts
        )
        if args.adapter is not None:
            option = f"--adapter {args.adapter}"
            PeftModel.from_pretrained(pipeline.transformer, args.adapter)  # puts its layers into the transformer
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{option}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(args.device)
