"""Real pictures as latents: `dmdr-train pictures` writes them, and a discriminator learns from them.

They are a folder of shards, see `dmdr_train.data.shard_folder`. A shard has n pictures: the tensor `x0`,
`[n, C, H, W]` float32, and in its metadata the `prompts` or class labels, a list in JSON.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmdr_models.base.picture_size import as_setting
from dmdr_models.folder.fingerprints import content_fingerprint

from dmdr_train.base.errors import UserError
from dmdr_train.data.shard_folder import ShardFolder
from dmdr_train.data.stored_samples import StoredSamples, prompts_of
from dmdr_train.recipe.schema import Model, Recipe

if TYPE_CHECKING:
    import torch

FORMAT = 1


def pictures_folder(key: str, folder: str | Path) -> ShardFolder:
    """The folder of pictures; errors name `key`."""
    return ShardFolder(key, Path(folder), "pictures", "pictures")


def made_with(model: Model) -> dict[str, Any]:
    """The entries of a manifest that identify the VAE of the latents."""
    vae = model.vae or os.path.join(model.path, "vae")
    alone = os.path.isdir(model.path) and not os.path.isdir(vae)  # a family whose latents are the pictures
    return {"format": FORMAT, "family": model.family, "vae": None if alone else content_fingerprint(vae)}


def check_pictures(settings: Recipe) -> None:
    """Check that `data.pictures` is a complete folder, of this recipe's VAE and prompts. Imports no torch.

    Raises:
        UserError: the folder is incomplete, was encoded by another VAE, or has a prompt without an embedding.
    """
    data, sizes = settings.data, settings.model.sizes
    if data.pictures is None:
        return
    wanted, shards = made_with(settings.model), pictures_folder("data.pictures", data.pictures)
    if sizes:
        wanted["resolution"] = as_setting(sizes[0].shape)
    manifest = shards.check(wanted)
    if data.embeddings is not None:
        from dmdr_train.data.embedding_cache import EmbeddingCache

        cache = EmbeddingCache(data.embeddings)
        for prompts in prompts_of(shards, manifest["shards"]).values():
            for prompt in prompts:
                if prompt not in cache:
                    raise UserError(
                        "data.pictures",
                        f"{data.pictures} has the prompt {prompt!r}, which is not in data.embeddings "
                        f"{data.embeddings}; leave data.embeddings out, or encode the prompts of the pictures, too",
                    )


class RealPictures(StoredSamples):
    """Draws the pictures in a folder of `dmdr-train pictures`; arguments and errors are those of `StoredSamples`."""

    def __init__(
        self, folder: str | Path, latent_shape: tuple[int, ...], batch_size: int, device: "torch.device | str" = "cpu"
    ):
        super().__init__(pictures_folder("data.pictures", folder), ("x0",), latent_shape, batch_size, device)
