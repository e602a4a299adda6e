"""The memory format in which convolutions are fastest on tensor cores: NHWC, torch's `channels_last`.

See https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html.
"""

import torch
from torch import nn


def channels_last(module: nn.Module) -> int:
    """Store the frozen weights of a module's convolutions with the channels last, in place; return their number.

    A convolution passes the format of its weights on, so all between them follows. Results differ by rounding.
    Weights that are trained keep their order, in which the optimizer takes them. Layers whose windows do not overlap,
    such as the patch embedding of a transformer and kernels of one pixel, gain nothing and stay as they are.
    """
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size[0] > layer.stride[0] and not layer.weight.requires_grad
    ]
    for layer in layers:
        layer.to(memory_format=torch.channels_last)
    return len(layers)
