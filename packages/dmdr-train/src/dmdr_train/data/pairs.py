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

from dmdr_train.base.errors import UserError
from dmdr_train.data.shard_folder import ShardFolder
from dmdr_train.data.stored_samples import StoredSamples
from dmdr_train.recipe.schema import Model, Recipe

if TYPE_CHECKING:
    import torch

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


class Pairs(StoredSamples):
    """Draws the pairs in a folder of `dmdr-train pairs`; arguments and errors are those of `StoredSamples`."""

    def __init__(
        self, folder: str | Path, latent_shape: tuple[int, ...], batch_size: int, device: "torch.device | str" = "cpu"
    ):
        super().__init__(pairs_folder("data.pairs", folder), ("noise", "x0"), latent_shape, batch_size, device)

    def draw(self, draws: "Draws") -> "Start":
        """Draw prompts, noise and the teacher's samples for a micro-batch."""
        from dmdr_train.data.prompt_order import Start

        prompts, tensors = self.rows(draws)
        return Start(prompts, tensors["noise"], tensors["x0"])
