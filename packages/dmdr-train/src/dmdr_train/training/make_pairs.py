"""The work of `dmdr-train pairs`: it writes pairs of noise and the teacher's sample, drawn by a deterministic sampler.

Prompt, noise and x0 of pair number i depend on the seed and i alone. A larger count adds pairs to a folder.
"""

import json
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from dmdr_core import randn
from dmdr_models.base.picture_size import as_setting
from dmdr_models.drawing.sampling import sample

from dmdr_train.base.errors import naming
from dmdr_train.base.random_draws import Draws
from dmdr_train.data.pairs import made_with, pairs_folder
from dmdr_train.data.prompt_order import make_prompts
from dmdr_train.data.shard_folder import Made, processes
from dmdr_train.distributed.device import DTYPES, choose_device
from dmdr_train.recipe.schema import Recipe
from dmdr_train.training.networks import load_family, load_network


def make_pairs(
    settings: Recipe,
    folder: Path,
    count: int,
    steps: int = 50,
    guidance: float | None = None,
    batch_size: int = 8,
    dtype: str = "bf16",
    shard_size: int = 64,
) -> None:
    """Write this process's share of `count` pairs of the recipe's teacher, for the recipe's prompts and first size.

    Args:
        steps: of the deterministic sampler.
        guidance: scale of classifier-free guidance; None takes the teacher's own of the recipe.
        batch_size: pairs that are drawn at once.
        dtype: bf16, fp16 or fp32, of the teacher; pairs are in float32.
        shard_size: pairs per file.

    Raises:
        UserError: the folder has other contents, or the disk is too small.
    """
    device = choose_device(settings.run, "fp32")
    family = load_family(settings, DTYPES[dtype])
    scale = settings.guidance.drawing_cfg if guidance is None else guidance
    sampling = {"steps": steps, "guidance": scale, "shift": settings.rollout.shift}
    shards = pairs_folder("--output", folder)
    made = {"resolution": as_setting(family.size), **sampling, "seed": settings.run.seed, "dtype": dtype}
    if settings.guidance.unconditional != "model":
        made["unconditional"] = settings.guidance.unconditional
    shards.prepare(made_with(settings.model) | made)
    network = load_network(settings.model, family).to(device)
    family.to(device)
    source = make_prompts(settings, family)
    shape = family.latent_shape(*family.size)

    def make(rows: Sequence[int], done: Callable[[int], Any]) -> Made:
        draws = Draws(settings.run.seed, ("pairs", 0), rows)
        prompts, parts = source.draw(draws), []
        noise = randn((len(rows), *shape), draws.each("noise"))
        for batch in (slice(first, first + batch_size) for first in range(0, len(rows), batch_size)):
            condition = family.condition(prompts[batch])
            x0 = sample(
                family, network, condition, noise[batch].to(device), steps, "euler", scale, settings.rollout.shift
            )
            parts.append(x0.float().cpu())
            done(len(x0))
        return {"noise": noise, "x0": torch.cat(parts)}, {"prompts": json.dumps(prompts)}

    with naming("--output"):
        shards.remove_damaged()
        shards.write(shards.plan(count, shard_size), make, lambda: 8 * prod(shape), *processes())
