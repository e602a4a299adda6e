"""How a student is saved if no pipeline of diffusers knows its network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dmdr_models.base.errors import ModelsError
from dmdr_models.base.picture_size import as_setting
from dmdr_models.networks.lora import LoRANetwork

FLAGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""What `dmdr-generate --dtype` calls torch's dtypes."""


class NetworkStudents:
    """Writes the network; see `dmdr_models.families.protocols.Students`.

    `dmdr-generate --model` opens the folder of a student for class labels. A student for texts takes the text encoders
    of the model that it was made from, and is opened with `--weights`.

    Args:
        family: a `dmdr_models.families.network_family.NetworkFamily`.
    """

    keeps_lora = False
    has_original = False

    def __init__(self, family: Any):
        self.family = family

    @property
    def sampling(self) -> dict[str, Any]:
        if self.family.layout.takes == "labels":
            return {}
        return {"size": as_setting(self.family.size), "max_tokens": getattr(self.family, "max_tokens", None)}

    def save(self, network: nn.Module, folder: Path) -> None:
        network.save_pretrained(folder / self.family.layout.network_part)  # type: ignore[operator]

    def save_lora(self, network: LoRANetwork, folder: Path) -> None:
        raise ModelsError(f"the family {self.family.layout.name} keeps no LoRA: save network.merged() with `save`")

    def save_original(self, network: nn.Module, file: Path) -> None:
        raise ModelsError(f"the family {self.family.layout.name} has no layout but diffusers': use `save`")

    def save_scheduler(self, folder: Path, shift: float, stochastic: bool = False) -> None:
        """Nothing: there is no pipeline to be told."""

    def usage(
        self,
        folder: Path,
        sampling: Mapping[str, Any],
        lora: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> str:
        """See `dmdr_models.families.protocols.Students.usage`."""
        layout, options = self.family.layout, flags(device, dtype)
        if layout.takes == "labels":
            return f"    dmdr-generate --family {layout.name} --model {folder} --classes 0,1{options} -o pictures.png\n"
        own = f'--model {self.family.path} --weights {folder} "a photo of a fox in the snow"'
        return f"    dmdr-generate --family {layout.name} {own}{options} -o fox.png\n"


def flags(device: str, dtype: str) -> str:
    """The options of `dmdr-generate` for a device and a dtype, with a space before each; "" for its defaults."""
    found = f" --device {device}" if device != "cpu" else ""
    return found + (f" --dtype {FLAGS[dtype]}" if dtype != "float32" else "")
