"""`dmdr-train encode`: the embeddings of all prompts that a recipe may ask for, written once.

Every process makes the shards that fall to it and waits for no other. A shard is called by its prompts and is there
only when it is whole, so an interrupted run goes on with what is missing, on any number of processes; whoever finds
all of them there writes the manifest. Prompts that come later become new shards beside the old.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dmdr_models
import numpy as np
import torch
from dmdr_models.family import Condition
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dmdr_train.embeddings import HASH, is_whole, prompt_hash, read_hashes, read_manifest, write_manifest
from dmdr_train.engines import DTYPES, choose_device
from dmdr_train.errors import UserError, naming
from dmdr_train.files import fingerprint, write_whole
from dmdr_train.prompt_files import evaluation_prompts, open_prompts
from dmdr_train.recipe import Recipe

Encode = Callable[[Sequence[str]], Condition]


def encode(settings: Recipe, folder: Path, dtype: str, batch_size: int) -> None:
    """Encode the prompts of a recipe into `folder`, which `embeddings.prepare` has made ready.

    Args:
        dtype: bf16 or fp32, of the text encoders and of what is written.
        batch_size: prompts per call of the text encoders.
    """
    texts = all_prompts(settings)
    model = settings.model
    with naming("model.path"):
        family = dmdr_models.load(
            model.family, model.path, vae=model.vae, max_tokens=model.max_tokens, dtype=DTYPES[dtype]
        )
    family.to(choose_device(settings.run, "fp32"))

    def condition(prompts: Sequence[str]) -> Condition:
        with naming("model.path"):  # the text encoders are opened at the first call
            return family.text(prompts)

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with naming("--output"):
        write_cache(folder, texts, condition, DTYPES[dtype], batch_size, rank, world)


def all_prompts(settings: Recipe) -> Any:
    """What a run may ask for, as a `datasets.Dataset`: its prompts, those of its samples, the evaluation's, and ""."""
    import datasets

    # A stream has no rows to choose from, and what is to be encoded once has to be read once anyway.
    prompts = open_prompts(settings.data.model_copy(update={"streaming": False}))
    more = [*(settings.tracking.samples.prompts or ()), *evaluation_prompts(), ""]
    return datasets.concatenate_datasets([prompts, datasets.Dataset.from_dict({"prompt": more}, prompts.features)])


def write_cache(
    folder: Path,
    texts: Any,
    condition: Encode,
    dtype: torch.dtype,
    batch_size: int = 32,
    rank: int = 0,
    world: int = 1,
    shard_size: int = 256,
) -> None:
    """Write this process's share of the shards, and the manifest if all are there then.

    Args:
        folder: with the manifest that `embeddings.prepare` wrote.
        texts: a `datasets.Dataset` with the column `prompt`; a prompt that is there twice is encoded once.
        condition: prompts -> the condition's tensors, `[B, …]`.

    Raises:
        UserError: the disk is too small.
    """
    shards = plan(folder, texts, shard_size)
    missing = {name: rows for name, rows in shards.items() if not (folder / name).exists()}
    if missing:
        check_space(folder, encode_batch([""], condition, dtype), sum(map(len, missing.values())))
    mine = {name: missing[name] for name in list(shards)[rank::world] if name in missing}
    label = f"prompts of process 1 of {world}" if world > 1 else "prompts"
    with tqdm(total=sum(map(len, mine.values())), desc=label, unit=" prompts", disable=rank > 0) as progress:
        for name, rows in mine.items():
            prompts = [text.strip() for text in texts[rows]["prompt"]]
            batches = []
            for first in range(0, len(prompts), batch_size):
                batches.append(encode_batch(prompts[first : first + batch_size], condition, dtype))
                progress.update(len(prompts[first : first + batch_size]))
            tensors = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
            tensors[HASH] = torch.tensor([prompt_hash(prompt) for prompt in prompts])
            write_whole(folder / name, partial(save_file, tensors))
    if all((folder / name).exists() for name in shards):
        finish(folder, list(shards))


def plan(folder: Path, texts: Any, shard_size: int) -> dict[str, np.ndarray]:
    """The shards that the cache lacks, by name: rows of `texts`, in their order, each prompt once.

    What the manifest lists counts as there; a listed shard that is damaged is removed.
    """
    listed = read_manifest("--output", folder)["shards"]
    for name, expected in listed.items():
        if not is_whole(folder / name, expected):
            (folder / name).unlink(missing_ok=True)
    known = [read_hashes(folder / name) for name in listed if (folder / name).exists()]
    hashes = np.array([prompt_hash(text) for batch in texts.iter(1000) for text in batch["prompt"]])
    _, rows = np.unique(hashes, return_index=True)
    rows = np.sort(rows[~np.isin(hashes[rows], np.concatenate([*known, np.array([], np.int64)]))])
    parts = [rows[first : first + shard_size] for first in range(0, len(rows), shard_size)]
    return {
        f"shard-{hashlib.blake2b(hashes[part].tobytes(), digest_size=8).hexdigest()}.safetensors": part
        for part in parts
    }


def finish(folder: Path, made: Sequence[str]) -> None:
    """Enter the shards that were made into the manifest: from now on they are part of the cache."""
    manifest = read_manifest("--output", folder)
    shards = {name: entry for name, entry in manifest["shards"].items() if is_whole(folder / name, entry)}
    new = [name for name in made if name not in shards]
    with ThreadPoolExecutor() as pool:
        shards |= zip(new, pool.map(lambda name: describe_shard(folder / name), new), strict=True)
    with safe_open(folder / next(iter(shards)), "pt") as file:
        tensors = {name: file.get_slice(name).get_shape()[1:] for name in sorted(file.keys()) if name != HASH}
    count = sum(entry["prompts"] for entry in shards.values())
    manifest |= {"prompts": count, "tensors": tensors, "shards": dict(sorted(shards.items()))}
    write_manifest(folder, manifest)
    for left in folder.glob(".shard-*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)
    print(f"Wrote {folder}: {count} prompts, {sum(entry['bytes'] for entry in shards.values()) / 1e9:.3g} GB")


def describe_shard(path: Path) -> dict[str, Any]:
    return {"prompts": len(read_hashes(path)), **fingerprint(path)}


@torch.no_grad()
def encode_batch(prompts: Sequence[str], condition: Encode, dtype: torch.dtype) -> dict[str, Tensor]:
    """The condition of some prompts on the CPU, numbers in `dtype`, whole numbers as they are."""
    tensors = condition(prompts)
    return {key: t.to("cpu", dtype if t.is_floating_point() else None).contiguous() for key, t in tensors.items()}


def check_space(folder: Path, one: dict[str, Tensor], count: int) -> None:
    """Refuse to begin what the disk cannot hold; `one` is the condition of a single prompt."""
    needed, free = count * sum(t.nbytes for t in one.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            "--output",
            f"{count} prompts take {needed / 1e9:.3g} GB and {folder} has {free / 1e9:.3g} GB left; "
            f"give a larger disk, fewer prompts or a smaller model.max_tokens",
        )
