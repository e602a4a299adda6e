"""How a student is saved for a stock pipeline of diffusers: as a LoRA, or as a network without its model."""

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from dmdr_models.base.atomic_files import write_whole
from dmdr_models.families.network_students import NetworkStudents, flags
from dmdr_models.families.original_layout import Place, kohya_lora, original_state
from dmdr_models.networks.lora import LoRANetwork


class StockStudents(NetworkStudents):
    """Students that diffusers and PEFT open; see `dmdr_models.families.protocols.Students`."""

    keeps_lora = True
    has_original = True
    pipeline_class: Any

    def save_lora(self, network: LoRANetwork, folder: Path) -> None:
        """Write an adapter three times into `folder`. Its alpha is its rank in all: alpha / rank is folded into B.

        - `adapter_model.safetensors` and `adapter_config.json`, for `PeftModel.from_pretrained(network, folder)`;
        - `pytorch_lora_weights.safetensors`, for `pipe.load_lora_weights(folder)`;
        - `kohya_lora.safetensors`, for ComfyUI, kohya's sd-scripts and programs that read no alpha from a config.
        """
        path, part = self.family.path, self.family.layout.network_part
        config: dict[str, Any] = LoraConfig(
            r=network.rank,
            lora_alpha=network.rank,
            base_model_name_or_path=Path(path).name if Path(path).is_dir() else path,
            inference_mode=True,
        ).to_dict()
        config["target_modules"] = sorted(network.targets)  # peft keeps a set, whose order is another each time
        state = {name: folded(name, tensor, network) for name, tensor in network.adapter_state().items()}
        layers = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": config}
        self.pipeline_class.save_lora_weights(folder, **layers)
        write_tensors(
            folder / "adapter_model.safetensors", {f"base_model.model.{name}": tensor for name, tensor in state.items()}
        )
        write_tensors(folder / "kohya_lora.safetensors", kohya_lora(state, self.place))
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_whole(folder / "adapter_config.json", lambda partial: partial.write_text(text, encoding="utf-8"))

    def save_original(self, network: nn.Module, file: Path) -> None:
        """See `dmdr_models.families.protocols.Students.save_original`."""
        write_tensors(file, original_state(network.state_dict(), self.place))

    @abstractmethod
    def place(self, layer: str) -> Place:
        """Where a layer of the network lies in the network that the model's authors published."""

    def usage(
        self,
        folder: Path,
        sampling: Mapping[str, Any],
        lora: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> str:
        """See `dmdr_models.families.protocols.Students.usage`."""
        option, own = "--adapter" if lora else "--weights", flags(device, dtype)
        model, scheduler = self.family.path, self.scheduler_class(sampling)
        apart = sampling["steps"] if sampling.get("lora_per_step") else 0
        return f"""    dmdr-generate --model {model} {option} {folder} "a photo of a fox in the snow"{own} -o fox.png

Or with diffusers alone, at the times of the training (a plain call with as many steps visits others):

```python
{self.snippet(*self.opening(str(folder), scheduler, lora, device, dtype, apart), sampling)}```
"""

    def opening(
        self, folder: str, scheduler: str, lora: bool, device: str, dtype: str, apart: int = 0
    ) -> tuple[str, str]:
        """The names of diffusers that a snippet imports, and its code that opens the model as `pipe`, with the student.

        Args:
            folder: of the student: that of the LoRA, or the one above the sub-folder of its whole network. Its
                `scheduler/` is the one of the training; the model's own may have any flags.
            scheduler: the class of the student's scheduler.
            apart: the number of steps that have a LoRA each, in sub-folders; 0 if one serves all. The code then has a
                function `switch` for the pipeline to call after each step.
        """
        whole, own = self.pipeline_class.__name__, self.family.network_class.__name__
        part = self.family.layout.network_part
        base, folder, dtype = json.dumps(self.family.path), json.dumps(folder), f"torch_dtype=torch.{dtype}"
        there, times = (
            f".to({json.dumps(device)})",
            f'scheduler = {scheduler}.from_pretrained({folder}, subfolder="scheduler")\n',
        )
        if lora:
            code = f"{times}pipe = {whole}.from_pretrained({base}, scheduler=scheduler, {dtype}){there}\n"
            if apart:
                return f"{scheduler}, {whole}", f"{code}{step_loras(folder, apart)}"
            return f"{scheduler}, {whole}", f"{code}pipe.load_lora_weights({folder})\n"
        code = f'{part} = {own}.from_pretrained({folder}, subfolder="{part}", {dtype})\n'
        code += f"{times}pipe = {whole}.from_pretrained({base}, {part}={part}, scheduler=scheduler, {dtype}){there}\n"
        return ", ".join(sorted((own, whole, scheduler))), code

    @abstractmethod
    def scheduler_class(self, sampling: Mapping[str, Any]) -> str:
        """The class of diffusers that `save_scheduler` saves for a student with this dmdr.json."""

    @abstractmethod
    def snippet(self, names: str, opening: str, sampling: Mapping[str, Any]) -> str:
        """Python code that draws a picture from a student with diffusers only, at the times where it was trained.

        Args:
            names, opening: what `opening` gives.
            sampling: the student's dmdr.json.
        """


def step_loras(folder: str, steps: int) -> str:
    """Code that loads the LoRA of each step, takes the first, and defines `switch`, which takes the next.

    Args:
        folder: of the student, as Python code.
    """
    return f"""student = {folder}
for step in range({steps}):
    pipe.load_lora_weights(f"{{student}}/step-{{step}}", adapter_name=f"step-{{step}}")
pipe.set_adapters("step-0")


def switch(pipe, step, timestep, tensors):  # after the last step, back to the first for the next picture
    pipe.set_adapters(f"step-{{(step + 1) % {steps}}}")
    return tensors


"""


def switching(sampling: Mapping[str, Any]) -> str:
    """The argument of a pipeline's call that switches LoRAs between steps, with a line's end; empty for one LoRA."""
    return "    callback_on_step_end=switch,\n" if sampling.get("lora_per_step") else ""


def folded(name: str, tensor: Tensor, network: LoRANetwork) -> Tensor:
    """A tensor of an adapter for its alpha to be its rank, which is what programs take for granted."""
    return (tensor.cpu() * (network.alpha / network.rank if ".lora_B." in name else 1)).contiguous()


def write_tensors(file: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors as a .safetensors file, whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_whole(file, lambda partial: save_file(plain, partial, metadata={"format": "pt"}))
