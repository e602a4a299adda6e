"""The work of `dmdr-train encode`: it writes the embeddings of all prompts that a run of a recipe may use.

The name of a shard depends on its prompts. Prompts that are added later go into new shards.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import dmdr_models
import numpy as np
import torch
from dmdr_models.families.protocols import Condition
from torch import Tensor

from dmdr_train.base.errors import naming
from dmdr_train.data.cut_prompts import cuts
from dmdr_train.data.embedding_cache import HASH, cache_folder, prompt_hash, read_hashes
from dmdr_train.data.prompt_files import evaluation_prompts, open_prompts
from dmdr_train.data.prompt_sets import read_prompt_sets
from dmdr_train.data.shard_folder import Made, ShardFolder, processes
from dmdr_train.distributed.device import DTYPES, choose_device
from dmdr_train.recipe.schema import Recipe

Encode = Callable[[Sequence[str]], Condition]


def encode(settings: Recipe, folder: Path, dtype: str, batch_size: int) -> None:
    """Encode the prompts of a recipe into `folder`, which `embedding_cache.prepare` has prepared.

    Args:
        dtype: bf16 or fp32, of the text encoders and of the written embeddings.
        batch_size: prompts per call of the text encoders.
    """
    texts = all_prompts(settings)
    model = settings.model
    with naming("model.path"):
        family = dmdr_models.load(
            model.family, model.path, vae=model.vae, max_tokens=model.max_tokens, dtype=DTYPES[dtype]
        )
    family.to(choose_device(settings.run, "fp32"))
    rank, world = processes()
    if rank == 0:
        for line in cuts("prompts", texts, model, family):
            print(line, file=sys.stderr, flush=True)

    def condition(prompts: Sequence[str]) -> Condition:
        with naming("model.path"):  # the first call opens the text encoders
            return family.text(prompts)

    with naming("--output"):
        write_cache(folder, texts, condition, DTYPES[dtype], batch_size, rank, world)


def all_prompts(settings: Recipe) -> Any:
    """All prompts that a run may use, as a `datasets.Dataset`: of the recipe, its samples, its evaluations, and ""."""
    import datasets

    # Shards choose rows by number, which a stream does not have; all prompts are read in any case.
    prompts = open_prompts(settings.data.model_copy(update={"streaming": False}))
    evaluation = settings.tracking.evaluation
    held_out = read_prompt_sets(evaluation.prompt_files) if evaluation else {}
    more = [*(settings.tracking.samples.prompts or ()), *evaluation_prompts(), *chain(*held_out.values()), ""]
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
    """Write this process's share of the shards, and the manifest once all shards exist.

    Args:
        folder: it has the manifest that `embedding_cache.prepare` wrote.
        texts: a `datasets.Dataset` with the column `prompt`; a prompt that comes twice is encoded once.
        condition: returns the condition of B prompts, tensors `[B, …]`.

    Raises:
        UserError: the disk is too small.
    """
    shards = cache_folder("--output", folder)

    def make(rows: Sequence[int], done: Callable[[int], Any]) -> Made:
        prompts = [text.strip() for text in texts[rows]["prompt"]]
        batches = []
        for batch in (prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)):
            batches.append(encode_batch(batch, condition, dtype))
            done(len(batch))
        tensors = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        return tensors | {HASH: torch.tensor([prompt_hash(prompt) for prompt in prompts])}, None

    def row_bytes() -> int:
        return sum(tensor.nbytes for tensor in encode_batch([""], condition, dtype).values())

    shards.remove_damaged()
    shards.write(plan(shards, texts, shard_size), make, row_bytes, rank, world)


def plan(shards: ShardFolder, texts: Any, shard_size: int) -> dict[str, Any]:
    """The shards that the cache lacks, by name, and their rows of `texts`, in order; each prompt comes once.

    The cache has what its manifest lists, except damaged shards.
    """
    known = [read_hashes(shards.path / name) for name in shards.whole()]
    hashes = np.array([prompt_hash(text) for batch in texts.iter(1000) for text in batch["prompt"]])
    _, rows = np.unique(hashes, return_index=True)
    rows = np.sort(rows[~np.isin(hashes[rows], np.concatenate([*known, np.array([], np.int64)]))])
    parts = [rows[first : first + shard_size] for first in range(0, len(rows), shard_size)]
    return {
        f"shard-{hashlib.blake2b(hashes[part].tobytes(), digest_size=8).hexdigest()}.safetensors": part
        for part in parts
    }


@torch.no_grad()
def encode_batch(prompts: Sequence[str], condition: Encode, dtype: torch.dtype) -> dict[str, Tensor]:
    """The condition of some prompts on the CPU; floating-point tensors are converted to `dtype`."""
    tensors = condition(prompts)
    return {key: t.to("cpu", dtype if t.is_floating_point() else None).contiguous() for key, t in tensors.items()}
