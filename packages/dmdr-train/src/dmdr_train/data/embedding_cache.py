"""The cache of prompt embeddings, which `dmdr-train encode` writes and a run reads in the place of its text encoders.

A folder of shards (see `dmdr_train.data.shard_folder`) that hold, of n prompts each, every tensor of the condition,
`[n, …]`, and `hash`, `[n]`. A prompt is found by its hash, and of a shard only the rows that are asked for are read.
White space around a prompt is no part of it.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dmdr_models import registry
from dmdr_models.folder.fingerprints import text_fingerprint

from dmdr_train.base.errors import UserError, naming
from dmdr_train.data.shard_folder import ShardFolder
from dmdr_train.recipe.schema import Model, Recipe

if TYPE_CHECKING:
    import torch
    from dmdr_models.families.protocols import Condition
    from torch import Tensor

FORMAT = 1
HASH = "hash"  # beside the condition's tensors in a shard


def prompt_hash(prompt: str) -> int:
    """Sixty-four bits that stand for a prompt: two of ten million prompts meet with a chance of one in 400 000."""
    return int.from_bytes(hashlib.blake2b(prompt.strip().encode(), digest_size=8).digest(), "little", signed=True)


def made_with(model: Model) -> dict[str, Any]:
    """What decides the embeddings of a prompt, besides the text encoders, as a manifest holds it."""
    usual = registry.find(model.family).max_tokens
    return {"format": FORMAT, "family": model.family, "max_tokens": model.max_tokens or usual}


def check_embeddings(settings: Recipe) -> None:
    """Check that `data.embeddings` is a whole cache, made by this recipe's text encoders. Imports no torch.

    A model's folder without text encoders passes: training from a cache does not need them.

    Raises:
        UserError: it is not.
    """
    if settings.data.embeddings is None:
        return
    model = settings.model
    wanted = made_with(model)
    with suppress(FileNotFoundError):
        wanted["text_encoders"] = text_fingerprint(registry.find(model.family), model.path, wanted["max_tokens"])
    cache_folder("data.embeddings", settings.data.embeddings).check(wanted)


def prepare(settings: Recipe, folder: Path, dtype: str) -> None:
    """Make `folder` ready for the recipe's embeddings: a new one, or one with embeddings of the same kind.

    Raises:
        UserError: there are no prompts or no text encoders, or the folder holds something else.
    """
    if settings.data.prompts is None:
        raise UserError("data.prompts", "is null, so there is nothing to encode; give a file of prompts")
    wanted = made_with(settings.model) | {"dtype": dtype}
    with naming("model.path"):
        layout = registry.find(settings.model.family)
        wanted["text_encoders"] = text_fingerprint(layout, settings.model.path, wanted["max_tokens"])
    cache_folder("--output", folder).prepare(wanted)


def cache_folder(key: str, folder: str | Path) -> ShardFolder:
    """The folder of a cache, whose errors name `key`."""
    return ShardFolder(key, Path(folder), "encode", "prompts")


def read_hashes(shard: Path) -> np.ndarray:
    """The hashes of a shard's prompts, `[n]` int64.

    Raises:
        ValueError: the file is damaged, or no shard.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, "np") as file:
            return file.get_tensor(HASH)
    except SafetensorError as error:
        raise ValueError(f"{shard} is damaged ({error}); delete it and encode again") from None


class EmbeddingCache:
    """Prompts to condition, as a family's text encoders would give it.

    Args:
        folder: what `dmdr-train encode` wrote.
        device, dtype: of the tensors that are returned; without a dtype they have the cache's own.

    Raises:
        UserError: the folder holds no cache.
    """

    def __init__(
        self, folder: str | Path, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
    ) -> None:
        self.folder, self.device, self.dtype = Path(folder), device, dtype
        self.shards = sorted(cache_folder("data.embeddings", folder).manifest()["shards"])
        hashes = [read_hashes(self.folder / name) for name in self.shards]
        order = np.argsort(np.concatenate(hashes), kind="stable")
        self.hashes = np.concatenate(hashes)[order]
        self.shard_of = np.repeat(np.arange(len(hashes)), [len(h) for h in hashes])[order]
        self.row_of = np.concatenate([np.arange(len(h)) for h in hashes])[order]

    def __len__(self) -> int:
        return len(self.hashes)

    def __call__(self, prompts: Sequence[str]) -> "Condition":
        """B prompts -> the condition's tensors, `[B, …]`.

        Raises:
            ValueError: names the first prompt that is not in the cache.
        """
        import torch

        rows = [self._read(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def _read(self, prompt: str) -> "dict[str, Tensor]":
        from safetensors import safe_open

        wanted = prompt_hash(prompt)
        place = int(np.searchsorted(self.hashes, wanted))
        if place == len(self.hashes) or self.hashes[place] != wanted:
            raise ValueError(
                f"prompt {prompt!r} is not in {self.folder}; add it with dmdr-train encode -o {self.folder}"
            )
        with safe_open(self.folder / self.shards[self.shard_of[place]], "pt") as file:
            row = int(self.row_of[place])
            tensors = {name: file.get_slice(name)[row] for name in file.keys() if name != HASH}  # noqa: SIM118
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
