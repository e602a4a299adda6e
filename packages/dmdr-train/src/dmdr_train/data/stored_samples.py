"""Rows of a folder of shards, each with its prompt: pairs of the teacher, and encoded pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_rewards.base.safe_reading import from_json

from dmdr_train.base.errors import UserError, naming
from dmdr_train.data.shard_folder import ShardFolder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws


class StoredSamples:
    """Draws rows in an order shuffled by the seed, each once in an epoch, as `prompt_order.TextPrompts` draws texts.

    Args:
        shards: of the folder. The metadata of a shard has the text `prompts`, a list in JSON.
        tensors: names of the tensors of a row, which all have the shape of the latents.
        latent_shape: (C, H, W) of the model's latents.
        batch_size: of the global batch.
        device: of the returned tensors.

    Raises:
        UserError: the folder has no such rows, or rows of another latent shape.
    """

    def __init__(
        self, shards: ShardFolder, tensors: Sequence[str], latent_shape: tuple[int, ...], batch_size: int,
        device: "torch.device | str" = "cpu",
    ):  # fmt: skip
        manifest, shape = shards.manifest(), list(latent_shape)
        if manifest.get("tensors") != dict.fromkeys(tensors, shape):
            raise UserError(
                shards.key,
                f"{shards.path} holds {manifest.get('tensors')} and the model's latents are {shape}; "
                f"give {shards.unit} of the same model.resolution",
            )
        self.names, self.batch_size, self.device = tuple(tensors), batch_size, device
        self.prompts: list[Any] = []
        self.places: list[tuple[Path, int]] = []
        for name, prompts in prompts_of(shards, manifest["shards"]).items():
            self.prompts += prompts
            self.places += [(shards.path / name, row) for row in range(len(prompts))]

    def rows(self, draws: "Draws") -> "tuple[list[Any], dict[str, Tensor]]":
        """Draw the prompts and the tensors `[b, C, H, W]` of a micro-batch of b rows."""
        import torch

        from dmdr_train.data.prompt_order import rows_in_turn

        rows = rows_in_turn(draws, self.batch_size, len(self.prompts))
        found = [self._read(row) for row in rows]
        tensors = {name: torch.stack([each[name] for each in found]).to(self.device) for name in self.names}
        return [self.prompts[row] for row in rows], tensors

    def real(self, draws: "Draws") -> "tuple[list[Any], Tensor]":
        """Draw prompts and clean latents `[b, C, H, W]`, the real samples of a discriminator."""
        prompts, tensors = self.rows(draws)
        return prompts, tensors["x0"]

    def _read(self, row: int) -> "dict[str, Tensor]":
        from safetensors import safe_open

        shard, place = self.places[row]
        with safe_open(shard, "pt") as file:
            return {name: file.get_slice(name)[place] for name in self.names}


def prompts_of(shards: ShardFolder, listed: Mapping[str, Mapping[str, int]]) -> dict[str, list[Any]]:
    """The prompts of the rows of each shard, by the shard's name, sorted. Imports no torch.

    Args:
        listed: the shards of the manifest.

    Raises:
        UserError: a shard does not say them.
    """
    from safetensors import safe_open

    found = {}
    for name in sorted(listed):
        shard = shards.path / name
        with naming(shards.key), safe_open(shard, "np") as file:
            prompts = from_json((file.metadata() or {}).get("prompts", "no prompts"))
            known = isinstance(prompts, list) and all(isinstance(prompt, str | int) for prompt in prompts)
            if not known or len(prompts) != listed[name][shards.unit]:
                raise ValueError(f"{shard} does not say which prompts its {shards.unit} have; give other {shards.unit}")
            found[name] = prompts
    return found
