"""What a student is handed out as: files that stock diffusers and PEFT read, and the code that reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig
from safetensors.torch import save_file

from dmdr_models.lora import LoRANetwork
from dmdr_models.sd3 import T_END


def save_lora(network: LoRANetwork, folder: Path, base: str) -> None:
    """Write an adapter twice into `folder`, each with its rank and alpha.

    - `adapter_model.safetensors` and `adapter_config.json`, for `PeftModel.from_pretrained(transformer, folder)`;
    - `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`.

    Args:
        base: name of the model that it was made for, for the record.
    """
    config: dict[str, Any] = LoraConfig(
        r=network.rank,
        lora_alpha=network.alpha,  # type: ignore[arg-type]
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(network.targets)  # peft keeps a set, whose order is another each time
    state = {name: tensor.cpu().contiguous() for name, tensor in network.adapter_state().items()}
    StableDiffusion3Pipeline.save_lora_weights(
        folder, transformer_lora_layers=state, transformer_lora_adapter_metadata=config
    )
    named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_scheduler(scheduler: Any, folder: Path, shift: float, stochastic: bool) -> None:
    """Write `folder/scheduler/`: the model's own with another shift, and with renoising if `stochastic`."""
    own = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=shift, stochastic_sampling=stochastic)
    own.save_pretrained(folder / "scheduler")


def snippet(base: str, folder: str, lora: bool, sampling: Mapping[str, Any]) -> str:
    """Python code that draws a picture from a student with diffusers alone, at the times where it was trained.

    A plain call with as many steps would visit others: it spreads them over the scheduler's own range, and assigning
    into `scheduler.config` changes no shift.

    Args:
        base: folder or hub name of the model that the student was made from.
        folder: of the student: the LoRA's, or the one that holds its whole `transformer/`.
        sampling: `steps`, `method`, `shift`, `size` and `max_tokens`, as in its dmdr.json.
    """
    stochastic, size = sampling["method"] == "sde", sampling["size"]
    dtype = "torch_dtype=torch.bfloat16"
    base, folder = json.dumps(base), json.dumps(folder)
    if lora:
        names = "StableDiffusion3Pipeline"
        load = f'pipe = StableDiffusion3Pipeline.from_pretrained({base}, {dtype}).to("cuda")\n'
        load += f"pipe.load_lora_weights({folder})\n"
    else:
        names = "SD3Transformer2DModel, StableDiffusion3Pipeline"
        load = f'transformer = SD3Transformer2DModel.from_pretrained({folder}, subfolder="transformer", {dtype})\n'
        load += (
            f'pipe = StableDiffusion3Pipeline.from_pretrained({base}, transformer=transformer, {dtype}).to("cuda")\n'
        )
    scheduler = f"pipe.scheduler.config, shift={sampling['shift']!r}, stochastic_sampling={stochastic}"
    # A pipeline hands its generator to no scheduler: the noise between steps would come from torch's global one.
    renoise = "pipe.scheduler.step = partial(pipe.scheduler.step, generator=generator)\n" if stochastic else ""
    return f"""{"from functools import partial" + 2 * chr(10) if stochastic else ""}import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {names}

{load}pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config({scheduler})
generator = torch.Generator().manual_seed(0)
{renoise}image = pipe(
    "a photo of a fox in the snow",
    sigmas=torch.linspace(1, {T_END!r}, {sampling["steps"] + 1})[:-1].tolist(),  # as in training, before the shift
    guidance_scale=0,
    height={size},
    width={size},
    max_sequence_length={sampling["max_tokens"]},
    generator=generator,
).images[0]
image.save("fox.png")
"""
