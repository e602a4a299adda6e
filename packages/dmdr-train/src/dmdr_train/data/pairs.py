"""Pairs of noise and the teacher's sample of it: `dmdr-train pairs` writes them, and regression learns from them.

They are a folder of shards, see `dmdr_train.data.shard_folder`. A shard has n pairs: the tensors `noise` and `x0`,
`[n, C, H, W]` float32, and in its metadata the text `prompts`, a list in JSON.
"""

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models import registry
from dmdr_models.base.picture_size import as_setting
from dmdr_models.folder.fingerprints import content_fingerprint, network_fingerprint
from dmdr_rewards.base.safe_reading import from_json

from dmdr_train.base.errors import UserError, naming
from dmdr_train.data.shard_folder import ShardFolder
from dmdr_train.recipe.schema import Model, Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dmdr_train.base.random_draws import Draws
    from dmdr_train.data.prompt_order import Start

FORMAT = 1


def pairs_folder(key: str, folder: str | Path) -> ShardFolder:
    """The folder of pairs; errors name `key`."""
    return ShardFolder(key, Path(folder), "pairs", "pairs")


def made_with(model: Model) -> dict[str, Any]:
    """The entries of a manifest that identify the teacher of pairs."""
    network = network_fingerprint(registry.find(model.family), model.path)
    for lora in model.teacher_loras:
        network = sha256(f"{network} {content_fingerprint(lora.path)} {lora.strength}".encode()).hexdigest()
    return {"format": FORMAT, "family": model.family, "network": network}


def check_pairs(settings: Recipe) -> None:
    """Check that `data.pairs` is a complete folder of pairs of this recipe's teacher. Imports no torch.

    If the recipe has no resolution, the shape of the pairs is checked when they are opened.

    Raises:
        UserError: the folder is incomplete, or its pairs are those of another teacher.
    """
    if settings.data.pairs is None:
        return
    wanted, sizes = made_with(settings.model), settings.model.sizes
    if sizes:
        wanted["resolution"] = as_setting(sizes[0].shape)
    pairs_folder("data.pairs", settings.data.pairs).check(wanted)


def side_of_pairs(folder: str | Path) -> int:
    """The shorter side in pixels of the pictures in a folder of pairs.

    Raises:
        UserError: the folder does not say it.
    """
    resolution = pairs_folder("data.pairs", folder).manifest().get("resolution")
    sides = resolution if isinstance(resolution, list) else [resolution]
    if not sides or not all(isinstance(side, int) for side in sides):
        raise UserError("data.pairs", f"{folder} does not say the resolution of its pictures; make the pairs again")
    return min(sides)


class Pairs:
    """Draws pairs in an order shuffled by the seed, each once in an epoch, as `prompt_order.TextPrompts` draws texts.

    Args:
        folder: of `dmdr-train pairs`.
        latent_shape: (C, H, W) of the model's latents.
        batch_size: of the global batch.
        device: of the returned tensors.

    Raises:
        UserError: the folder has no pairs, or pairs of another latent shape.
    """

    def __init__(
        self, folder: str | Path, latent_shape: tuple[int, ...], batch_size: int, device: "torch.device | str" = "cpu"
    ):
        from safetensors import safe_open

        manifest, shape = pairs_folder("data.pairs", folder).manifest(), list(latent_shape)
        if manifest.get("tensors") != {"noise": shape, "x0": shape}:
            raise UserError(
                "data.pairs",
                f"{folder} holds {manifest.get('tensors')} and the model's latents are {shape}; "
                f"give pairs of the same model.resolution",
            )
        self.batch_size, self.device = batch_size, device
        self.prompts: list[Any] = []
        self.places: list[tuple[Path, int]] = []
        for shard in (Path(folder) / name for name in sorted(manifest["shards"])):
            with naming("data.pairs"), safe_open(shard, "pt") as file:
                prompts = from_json((file.metadata() or {}).get("prompts", "no prompts"))
                known = isinstance(prompts, list) and all(isinstance(prompt, str | int) for prompt in prompts)
                if not known or len(prompts) != manifest["shards"][shard.name]["pairs"]:
                    raise ValueError(f"{shard} does not say which prompts its pairs have; give other pairs")
            self.prompts += prompts
            self.places += [(shard, row) for row in range(len(prompts))]

    def draw(self, draws: "Draws") -> "Start":
        """Draw prompts, noise and the teacher's samples for a micro-batch."""
        import torch

        from dmdr_train.data.prompt_order import Start, rows_in_turn

        rows = rows_in_turn(draws, self.batch_size, len(self.prompts))
        noise, target = (torch.stack(parts).to(self.device) for parts in zip(*map(self._read, rows), strict=True))
        return Start([self.prompts[row] for row in rows], noise, target)

    def _read(self, row: int) -> "tuple[Tensor, Tensor]":
        from safetensors import safe_open

        shard, place = self.places[row]
        with safe_open(shard, "pt") as file:
            return file.get_slice("noise")[place], file.get_slice("x0")[place]
