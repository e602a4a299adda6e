"""A cache of text embeddings."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class TextCache:
    """The most recently used embeddings of one text tower.

    A tower is one object for one checkpoint, device and dtype (`dmdr_rewards.networks.clip_towers`) and owns its cache,
    so an embedding is never returned for another checkpoint. Text towers are frozen and tokens carry no gradient, so an
    embedding stays valid.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], capacity: int = 4096) -> None:
        """encode: list of B texts -> Tensor[B, D]. capacity: number of prompts to remember."""
        self._encode = encode
        self._capacity = capacity
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def resize(self, capacity: int) -> None:
        """Clear the cache, and remember up to `capacity` prompts from now on."""
        self._capacity = capacity
        self._known.clear()

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B texts -> Tensor[B, D]. Unknown texts are encoded in one batch, each once."""
        found = {prompt: self._known[prompt] for prompt in prompts if prompt in self._known}
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if new:
            found.update(zip(new, map(torch.clone, self._encode(new)), strict=True))
        self._known.update(found)
        for prompt in found:
            self._known.move_to_end(prompt)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        # Embeddings cached under inference_mode cannot enter a graph; the stacked copy can.
        return torch.stack([found[prompt] for prompt in prompts])
