"""LoRAs of others on a network: beside its weights, as PEFT adds them, or folded into its weights."""

import warnings
from collections.abc import Iterable, Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from dmdr_models.networks.lora_files import A, B, LoRA


def add_loras(network: nn.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
    """Add LoRAs to a network, each with its strength. A call of the network then adds their contributions in order.

    Raises:
        ValueError: a LoRA does not fit the network.
    """
    for lora, _ in loras:
        lora.check(network)
    for index, (lora, strength) in enumerate(loras):
        name = f"lora_{index}"
        ranks = {f"^{layer}": change.rank for layer, change in lora.changes.items()}
        config = LoraConfig(r=1, target_modules=list(lora.changes), rank_pattern=ranks, inference_mode=True)
        state = {
            f"{layer}{suffix}": tensor
            for layer, change in lora.changes.items()
            for suffix, tensor in ((A, change.a), (B, change.b))
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is no accident
            inject_adapter_in_model(config, network, adapter_name=name, state_dict=state)
        for at, layer in network.named_modules():
            if isinstance(layer, LoraLayer) and name in layer.lora_A:
                a, b, scale = lora.changes[at]
                device = layer.weight.device
                layer.lora_A[name].weight = nn.Parameter(a.to(device), requires_grad=False)
                layer.lora_B[name].weight = nn.Parameter(b.to(device), requires_grad=False)
                layer.scaling[name] = strength * scale
    activate(network, range(len(loras)))


def activate(network: nn.Module, loras: Iterable[int]) -> None:
    """Let the next calls of a network add the contributions of these LoRAs alone, by their places in `add_loras`."""
    names = [f"lora_{index}" for index in loras]
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer._active_adapter = [name for name in names if name in layer.lora_A]


def fold_loras(network: nn.Module, loras: Sequence[tuple[LoRA, float]]) -> None:
    """Add LoRAs, each with its strength, to the weights of a network themselves.

    Raises:
        ValueError: a LoRA does not fit the network.
    """
    if not loras:
        return
    add_loras(network, loras)
    for at, layer in list(network.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = at.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
    del network.peft_config
