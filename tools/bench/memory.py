"""Memory against resolution, batch and gradient checkpointing: of a recipe by the plan, of a small model as measured.

    python tools/bench memory                                  # sd35-large-cold-start on one GPU
    python tools/bench memory RECIPE --sides 512 1024 --batches 1 2 4
    python tools/bench memory --measured                       # a medium SD3 on this CPU, beside its plan

The measured bytes are those of all tensors that exist at once in the generator's forward and backward pass, beside its
weights. The CPU's attention keeps other copies than a GPU's, so both sides write attention out.
"""

import tempfile
from pathlib import Path
from unittest import mock

import torch
from dmdr_train.planning import counting
from dmdr_train.planning.costs import costs_of
from dmdr_train.planning.memory import memory
from dmdr_train.planning.meta_models import models_of
from dmdr_train.planning.plan import with_memory, with_optim
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.training.networks import load_family, make_networks
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.common import SIZES, options_of, print_table, recipe

GIB, MIB = 2**30, 2**20
CHECKPOINTED: tuple[list[str], ...] = ([], ["network/4"], ["network/2"], ["network"], ["network", "vae", "rewards"])


def planned(name: str, overrides: list[str], sides: list[int], batches: list[int]) -> list[list[object]]:
    """GiB on one GPU, by side, checkpointing and batch."""
    rows: list[list[object]] = []
    for side in sides:
        for checkpointing in CHECKPOINTED:
            settings = load_recipe(name, [*overrides, f"model.resolution={side}"])
            settings = with_memory(settings, gradient_checkpointing=checkpointing)
            costs = costs_of(settings)
            totals = [
                memory(with_optim(settings, batch_size=batch, accumulation=1), costs, world=1).total
                for batch in batches
            ]
            rows.append([side, ", ".join(checkpointing) or "none", *(total / GIB for total in totals)])
    return rows


def peaks(settings: Recipe, batch: int) -> tuple[int, int]:
    """Bytes at the peak of the generator's two passes: of real tensors on this CPU, and by the plan."""
    family = load_family(settings)
    network = make_networks(settings, family, torch.device("cpu")).generator
    x, t = torch.randn(batch, *family.latent_shape(*family.size)), torch.rand(batch)
    attention = mock.patch.object(counting, "fused_attention", torch.nn.functional.scaled_dot_product_attention)
    with attention, models_of(settings) as models, sdpa_kernel(SDPBackend.MATH):
        condition = {
            name: torch.zeros(value.shape, dtype=value.dtype) for name, value in models.condition(batch).items()
        }
        meta = models.networks.generator
        plan = counting.cost(lambda: models.predict(meta, batch), meta.parameters(), backward=True)
        real = counting.cost(lambda: family.predict(network, x, t, condition), network.parameters(), backward=True)
    return real.peak, plan.peak


def measured(size: str, batches: list[int]) -> list[list[object]]:
    """MiB by checkpointing and batch: measured, planned, and their ratio."""
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = recipe("sd3", size, Path(folder))
        for checkpointing in CHECKPOINTED[:-1]:
            for batch in batches:
                real, plan = peaks(with_memory(settings, gradient_checkpointing=checkpointing), batch)
                rows.append([", ".join(checkpointing) or "none", batch, real / MIB, plan / MIB, real / plan])
    return rows


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("recipe", nargs="?", default="sd35-large-cold-start")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--size", choices=tuple(SIZES), default="medium", help="of the measured model")
    options = parser.parse_args()
    if options.measured:
        print_table(
            ["checkpointed", "batch", "MiB, measured", "MiB, planned", "ratio"],
            measured(options.size, options.batches),
        )
    else:
        print(f"{options.recipe}, GiB on one GPU\n")
        head = ["side", "checkpointed", *(f"batch {batch}" for batch in options.batches)]
        print_table(head, planned(options.recipe, options.overrides, options.sides, options.batches))


if __name__ == "__main__":
    main()
