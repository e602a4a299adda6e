"""What a student is handed out as: files that stock diffusers and PEFT read, and the code that reads them."""

import json
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file

from dmdr_models.networks.lora import LoRANetwork


def save_lora(network: LoRANetwork, folder: Path, base: str, pipeline: Any, part: str) -> None:
    """Write an adapter twice into `folder`, each with its rank and alpha.

    - `adapter_model.safetensors` and `adapter_config.json`, for `PeftModel.from_pretrained(network, folder)`;
    - `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`.

    Args:
        base: name of the model that it was made for, for the record.
        pipeline: the model's class in diffusers.
        part: of the pipeline, that the adapter is for.
    """
    config: dict[str, Any] = LoraConfig(
        r=network.rank,
        lora_alpha=network.alpha,  # type: ignore[arg-type]
        base_model_name_or_path=base,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(network.targets)  # peft keeps a set, whose order is another each time
    state = {name: tensor.cpu().contiguous() for name, tensor in network.adapter_state().items()}
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config})
    named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def opening(pipeline: Any, network: Any, part: str, base: str, folder: str, lora: bool, dtype: str) -> tuple[str, str]:
    """Python code that opens a model with a student in it, as `pipe`; and the names of diffusers that it needs.

    Args:
        pipeline, network: their classes in diffusers.
        part: of the pipeline, that is the network.
        base: folder or hub name of the model that the student was made from.
        folder: of the student: the LoRA's, or the one that holds its whole network as `part`.
    """
    whole, own = pipeline.__name__, network.__name__
    base, folder, dtype = json.dumps(base), json.dumps(folder), f"torch_dtype=torch.{dtype}"
    if lora:
        code = f'pipe = {whole}.from_pretrained({base}, {dtype}).to("cuda")\npipe.load_lora_weights({folder})\n'
        return whole, code
    code = f'{part} = {own}.from_pretrained({folder}, subfolder="{part}", {dtype})\n'
    code += f'pipe = {whole}.from_pretrained({base}, {part}={part}, {dtype}).to("cuda")\n'
    return ", ".join(sorted((own, whole))), code
