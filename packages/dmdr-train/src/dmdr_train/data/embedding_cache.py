"""The cache of prompt embeddings: `dmdr-train encode` writes it, and a run reads it instead of using text encoders.

It is a folder of shards, see `dmdr_train.data.shard_folder`. A shard has the embeddings of n prompts: every tensor of
the condition, `[n, …]`, and `hash`, `[n]`. A prompt is found by its hash, and only its row of the shard is read. White
space around a prompt is ignored.
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
HASH = "hash"  # the name of the tensor in a shard


def prompt_hash(prompt: str) -> int:
    """A hash of 64 bits: among ten million prompts, two have the same hash with a probability of 1 in 400 000."""
    return int.from_bytes(hashlib.blake2b(prompt.strip().encode(), digest_size=8).digest(), "little", signed=True)


def made_with(model: Model) -> dict[str, Any]:
    """The entries of a manifest that decide the embeddings of a prompt, except for the text encoders."""
    usual = registry.find(model.family).max_tokens
    return {"format": FORMAT, "family": model.family, "max_tokens": model.max_tokens or usual}


def check_embeddings(settings: Recipe) -> None:
    """Check that `data.embeddings` is a complete cache, made by this recipe's text encoders. Imports no torch.

    A model folder without text encoders passes, since training from a cache does not need them.

    Raises:
        UserError: the cache is incomplete, or was made by other text encoders.
    """
    if settings.data.embeddings is None:
        return
    model = settings.model
    wanted = made_with(model)
    with suppress(FileNotFoundError):
        wanted["text_encoders"] = text_fingerprint(registry.find(model.family), model.path, wanted["max_tokens"])
    cache_folder("data.embeddings", settings.data.embeddings).check(wanted)


def prepare(settings: Recipe, folder: Path, dtype: str) -> None:
    """Make a folder for the recipe's embeddings, or check that an existing folder has embeddings of the same kind.

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
    """The folder of a cache; errors name `key`."""
    return ShardFolder(key, Path(folder), "encode", "prompts")


def read_hashes(shard: Path) -> np.ndarray:
    """Read the hashes of a shard's prompts, `[n]` int64.

    Raises:
        ValueError: the file is damaged, or is not a shard.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, "np") as file:
            return file.get_tensor(HASH)
    except SafetensorError as error:
        raise ValueError(f"{shard} is damaged ({error}); delete it and encode again") from None


class EmbeddingCache:
    """Turns prompts into the condition that the family's text encoders would return.

    Args:
        folder: of `dmdr-train encode`.
        device, dtype: of the returned tensors; without a dtype they have that of the cache.

    Raises:
        UserError: the folder is not a cache.
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

    def __contains__(self, prompt: object) -> bool:
        return isinstance(prompt, str) and self._place(prompt) is not None

    def __call__(self, prompts: Sequence[str]) -> "Condition":
        """Read the condition of B prompts, tensors `[B, …]`.

        Raises:
            ValueError: a prompt is not in the cache.
        """
        import torch

        rows = [self._read(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def _read(self, prompt: str) -> "dict[str, Tensor]":
        from safetensors import safe_open

        place = self._place(prompt)
        if place is None:
            raise ValueError(
                f"prompt {prompt!r} is not in {self.folder}; add it with dmdr-train encode -o {self.folder}"
            )
        with safe_open(self.folder / self.shards[self.shard_of[place]], "pt") as file:
            row = int(self.row_of[place])
            tensors = {name: file.get_slice(name)[row] for name in file.keys() if name != HASH}  # noqa: SIM118
        return {name: t.to(self.dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def _place(self, prompt: str) -> int | None:
        """The place of a prompt's hash among those of all shards."""
        wanted = prompt_hash(prompt)
        place = int(np.searchsorted(self.hashes, wanted))
        return None if place == len(self.hashes) or self.hashes[place] != wanted else place
