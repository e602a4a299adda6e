"""Operations of a step under each schedule of rollouts, without and with gradient checkpointing, by the plan.

    python tools/bench schedule                      # sd35-large-cold-start: SD3.5-Large at 1024 x 1024
    python tools/bench schedule RECIPE [key=value …]

Nothing runs: the networks are counted on the meta device, as `dmdr-train plan` does. The authors' schedule draws new
samples for every update, renoises the generator's own predictions and encodes the texts again.
"""

from collections.abc import Callable

from dmdr_train.planning.costs import Costs, costs_of
from dmdr_train.planning.plan import step_flops, with_memory
from dmdr_train.planning.schedule import stages
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe

from bench.common import options_of, print_table

SCHEDULES = {
    "the authors' schedule": {"states": "authors", "reuse": "none"},
    "reuse: none": {"reuse": "none"},
    "reuse: states": {"reuse": "states"},
    "reuse: sample": {"reuse": "sample"},
}
AUTHORS = next(iter(SCHEDULES))


def table(settings: Recipe, count: Callable[[Recipe], Costs] = costs_of) -> dict[str, tuple[float, float]]:
    """Operations of a sample's share of a step in the last stage, by schedule: without and with checkpointing."""
    found: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    for checkpointing in ([], ["network"]):
        kept = with_memory(settings, gradient_checkpointing=checkpointing)
        costs = count(kept)
        for name, changes in SCHEDULES.items():
            changed = kept.model_copy(update={"rollout": kept.rollout.model_copy(update=changes)})
            flops = step_flops(changed, costs, stages(changed)[-1])
            found[name].append(sum(flops.values()) / settings.optim.batch_size)
    return {name: (plain, repeated) for name, (plain, repeated) in found.items()}


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("recipe", nargs="?", default="sd35-large-cold-start")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    found = table(load_recipe(options.recipe, options.overrides))
    least = found[AUTHORS][0]
    rows = [
        [name, plain / 1e12, plain / least, repeated / 1e12, repeated / least]
        for name, (plain, repeated) in found.items()
    ]
    print(f"{options.recipe}, TFLOP per sample and step; ratios to {AUTHORS} without checkpointing\n")
    print_table(["schedule", "no checkpointing", "ratio", "network checkpointed", "ratio"], rows)


if __name__ == "__main__":
    main()
