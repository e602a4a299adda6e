"""Quantising the linear layers of a frozen network (QLoRA, arXiv 2305.14314), by bitsandbytes or torchao.

Only the stored weights are quantised. A layer computes in the precision of its input, with weights that it dequantises
at every call, so gradients flow to the input and to the adapters as through a layer with these weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmdr_models.folder.quantisation import Quantisation


def quantise(network: nn.Module, kind: Quantisation, device: torch.device | str = "cpu") -> None:
    """Quantise the weights of all linear layers of a network, one layer after the other, and freeze the network.

    Each layer is moved before it is quantised, so the device never holds the whole network in full precision. The rest
    of the network stays where it is.

    Args:
        network: in the precision that it computes in; it is changed in place.
        kind: `nf4` has 4 bits in blocks of 64 weights, with quantised scales; `int8` and `fp8` (e4m3) have 8 bits with
            a scale per row. Biases stay as they are.
        device: of the quantised layers.

    Raises:
        ImportError: the format's library is not installed.
    """
    network.requires_grad_(False)
    quantised = _nf4 if kind == "nf4" else _torchao(kind)
    for name, layer in list(network.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, quantised(layer.to(device)))
    if kind == "nf4":
        network.is_loaded_in_4bit = True  # type: ignore[assignment]  # how peft recognises such a network


def _nf4(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, shape = layer.weight, (layer.in_features, layer.out_features)
    found = Linear4bit(*shape, bias=layer.bias is not None, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    found.weight = Params4bit(weight.data, requires_grad=False, quant_type="nf4", module=found)
    found.bias = layer.bias
    return found.to(weight.device)  # quantises


def _torchao(kind: Quantisation) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind]()

    def quantised(layer: nn.Linear) -> nn.Module:
        quantize_(layer, config)
        return frozen(layer)

    return quantised


def freeze_torchao(network: nn.Module) -> None:
    """Replace all linear layers with weights of torchao by `FrozenLinear`, in place; others stay as they are."""
    for name, layer in list(network.named_modules()):
        if type(layer) is nn.Linear and type(layer.weight.data) is not Tensor:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, frozen(layer))


def frozen(layer: nn.Linear) -> "FrozenLinear":
    """The layer as a `FrozenLinear`, with the same tensors."""
    found = FrozenLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    found.weight, found.bias = layer.weight, layer.bias
    return found.train(layer.training).requires_grad_(False)


class FrozenLinear(nn.Linear):
    """A linear layer with frozen weights of torchao, which its backward pass dequantises again.

    torchao's own operation keeps the dequantised weights of every layer for the backward pass, so that a network in 8
    bits would take more memory in training than one in bf16.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _FrozenLinear.apply(input, self.weight, self.bias)


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b with ∂L/∂x = ∂L/∂y W; W and b have no gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.dequantize().to(gradient.dtype), None, None
