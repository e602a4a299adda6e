"""LoRA through peft, with a strength that is chosen at every call.

The guidance network is one frozen network that plays two roles: at scale s_f it is the fake score, at scale s_r the
teacher. Scale 0 is the bare network bit for bit; scale 2 is the same as doubling B.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def lora_target_names(network: nn.Module) -> list[str]:
    """The last parts of the names of all linear and convolution layers: what `targets` may hold."""
    kinds = (nn.Linear, nn.Conv2d)
    return sorted({name.rsplit(".", 1)[-1] for name, module in network.named_modules() if isinstance(module, kinds)})


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Raise a ValueError that names the first target matching no layer, with the nearest that does."""
    names = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            valid = lora_target_names(network)
            near = difflib.get_close_matches(target, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(valid)}"
            raise ValueError(f"LoRA target {target!r} matches no layer of the network; {hint}")


class LoRANetwork(nn.Module):
    """A frozen network with a trainable LoRA of a given strength.

    Calling it as `network(*inputs, lora_scale=s, **inputs)` runs the network with the adapter's contribution
    (alpha / rank) · B·A multiplied by `s`. A backward pass that recomputes activations (gradient checkpointing) finds
    the scale of its own forward pass, also when the network was called with another one in between.

    Args:
        network: any module; all of its parameters are frozen, and its layers are changed in place.
        rank, alpha: of the adapter; B starts at zero, so that the adapter starts without effect.
        targets: names, or last parts of names, of the linear and convolution layers to adapt.
        generator: draws the start values of A.

    Raises:
        ValueError: a target matches no layer.
    """

    ADAPTER = "lora"

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_targets(network, targets)
        network.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)  # type: ignore[arg-type]
        self.network = inject_adapter_in_model(config, network, adapter_name=self.ADAPTER)
        self.unit = alpha / rank
        self.layers = [module for module in self.network.modules() if isinstance(module, LoraLayer)]
        for layer in self.layers:
            a: Any = layer.lora_A[self.ADAPTER].weight
            # peft draws A with kaiming_uniform(a=√5), which is U(−1/√fan_in, 1/√fan_in), from the global generator.
            nn.init.uniform_(a, -(a[0].numel() ** -0.5), a[0].numel() ** -0.5, generator=generator)

    @property
    def config(self) -> Any:
        return self.network.config

    def set_scale(self, scale: float) -> None:
        for layer in self.layers:
            layer.scaling[self.ADAPTER] = scale * self.unit

    def forward(self, *inputs: Any, lora_scale: float = 1.0, **named: Any) -> Tensor:
        self.set_scale(lora_scale)
        output = self.network(*inputs, **named)
        if isinstance(output, Tensor) and output.requires_grad:
            # Runs first of all in the backward pass of this very call.
            output.register_hook(lambda _: self.set_scale(lora_scale))
        return output

    def merged(self) -> nn.Module:
        """The network with the adapter at scale 1 folded into its weights; this object is used up."""
        self.set_scale(1.0)
        for name, module in list(self.network.named_modules()):
            if isinstance(module, LoraLayer):
                module.merge(adapter_names=[self.ADAPTER])
                parent, _, child = name.rpartition(".")
                setattr(self.network.get_submodule(parent), child, module.get_base_layer())
        return self.network
