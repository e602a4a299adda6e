"""The hidden state of a network in its middle, as tokens."""

from typing import Any

from torch import Tensor, nn


def middle_block(network: nn.Module) -> nn.Module:
    """The block in the middle of a network: a UNet's `mid_block`, or of its repeated blocks the middle one.

    Raises:
        ValueError: the network's class names no repeated blocks (`_repeated_blocks` or `_no_split_modules`).
    """
    found = getattr(network, "mid_block", None)
    if found is not None:
        return found
    names = getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ()
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(network).__name__} names no repeated blocks, whose features could be read")
    return blocks[len(blocks) // 2]


class MiddleFeatures:
    """Records what the middle block of a network returns while this is open.

        with MiddleFeatures(network) as features:
            network(x, t)
        features.tokens()

    Of several tensors, such as those of text and picture, the last one counts: the picture's, in diffusers' blocks.
    """

    def __init__(self, network: nn.Module):
        self.block = middle_block(network)
        self.output: Any = None

    def __enter__(self) -> "MiddleFeatures":
        self.output = None
        self.hook = self.block.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def tokens(self) -> Tensor:
        """The hidden state `[B, N, C]` of the last call, float32, with its graph."""
        output: Tensor = self.output if isinstance(self.output, Tensor) else self.output[-1]
        self.output = None
        return (output.flatten(2).transpose(1, 2) if output.ndim == 4 else output).float()

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.output = output
