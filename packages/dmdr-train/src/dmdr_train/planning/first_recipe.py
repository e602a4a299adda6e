"""The recipe that `dmdr-train init` writes: a built-in recipe for the user's model that fits by its plan."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from dmdr_rewards.base.safe_reading import from_json

from dmdr_train.base.errors import UserError
from dmdr_train.planning.checkpointing import CHOICES, SHARE, with_checkpointing
from dmdr_train.planning.costs import Costs, costs_of
from dmdr_train.planning.gpus import GPU
from dmdr_train.planning.memory import memory
from dmdr_train.planning.model_configs import known
from dmdr_train.planning.plan import USABLE, Plan, make_plan, with_optim
from dmdr_train.planning.table import short_lines
from dmdr_train.recipe import shipped
from dmdr_train.recipe.load import apply_override, from_yaml, parse_recipe
from dmdr_train.recipe.schema import Recipe

BASES = {
    "sit": {"distribution_matching": "sit-xl-2-cold-start", "refl": "sit-xl-2-refl"},
    "sd3": {
        "distribution_matching": "sd3-medium-cold-start", "refl": "sd3-medium-refl", "srpo": "sd3-medium-srpo",
        "joint": "sd3-medium-joint",
    },
    "sdxl": {"distribution_matching": "sdxl-4step", "regression": "sdxl-regression", "refl": "sdxl-1step-refl"},
}  # fmt: skip
"""The built-in recipes that a recipe starts from, by family and objective."""
CHOSEN = ("optim.accumulation", "memory.gradient_checkpointing")
"""The keys whose values follow from the GPUs."""
LARGE = 30
"""Layers from which on an SD3 is taken for the large one, whose recipes have other learning rates."""

Data = dict[str, Any]


@dataclass(frozen=True)
class Hardware:
    """GPUs of one machine, and the GB of each of them; None for what this kind has."""

    gpu: GPU
    gpus: int
    gpu_memory: float | None

    @property
    def capacity(self) -> int:
        """The bytes of a GPU that a plan may fill."""
        return int((self.gpu_memory or self.gpu.memory) * 1e9 * USABLE)


def first_recipe(family: str, objective: str, overrides: Sequence[str], where: Hardware) -> tuple[str, Plan]:
    """Write a recipe that fits.

    Args:
        overrides: `key=value` texts, such as that of `model.path`; they win over the built-in recipe's.

    Returns:
        The text of the recipe, and its plan.

    Raises:
        UserError: there is no such recipe, a value is wrong, or nothing fits.
    """
    for key in (override.partition("=")[0] for override in overrides):
        if key in CHOSEN:
            raise UserError(key, "is what init chooses; change it in the file afterwards")
    if objective not in BASES[family]:
        raise UserError("--objective", f"{objective} has no recipe for {family}; give {', '.join(BASES[family])}")
    base = BASES[family][objective]
    data = changed(base, overrides)
    if family == "sd3" and layers(data["model"]["path"]) >= LARGE:
        base = base.replace("sd3-medium", "sd35-large")
        if base not in shipped.names():
            raise UserError("--objective", f"{objective} has no recipe for a large SD3; give another")
        data = changed(base, overrides)
    batch = data["optim"]["batch_size"]
    data["optim"] |= {"batch_size": -(-batch // where.gpus) * where.gpus, "accumulation": 1}
    data["memory"] = {**data.get("memory", {}), "gradient_checkpointing": "auto"}
    fitting = fit(data, where)
    plan = make_plan(parse_recipe(fitting), where.gpu, where.gpus, gpu_memory=where.gpu_memory)
    return text(fitting, base, plan), plan


def changed(base: str, overrides: Sequence[str]) -> Data:
    """A built-in recipe with other values.

    Raises:
        UserError: an override cannot be read.
    """
    data = from_yaml(shipped.source(base))
    for override in overrides:
        apply_override(data, override)
    return data


def layers(path: str) -> int:
    """The transformer layers of a model in a folder, or of a well-known one; 0 for others."""
    file = Path(path) / "transformer/config.json"
    config = from_json(file.read_bytes()) if file.is_file() else (known(path) or {}).get("transformer", {})
    found = config.get("num_layers", 0) if isinstance(config, dict) else 0
    return found if isinstance(found, int) else 0


def fit(data: Data, where: Hardware) -> Data:
    """The recipe with as few means of saving memory as it needs, and with the smallest accumulation that fits.

    Raises:
        UserError: none of them suffices, or the recipe is not valid.
    """
    least = 0
    for saving in savings(data, where.gpus):
        recipe = parse_recipe(saving)
        for parts in CHOICES:
            chosen = with_checkpointing(recipe, parts)
            costs = costs_of(chosen)
            sizes = {n: taken(chosen, costs, n, where.gpus) for n in divisors(recipe.optim.batch_size // where.gpus)}
            fits = [n for n, size in sizes.items() if size <= SHARE * where.capacity]
            if fits:
                saving["optim"]["accumulation"] = min(fits)
                return saving
            least = min([least or max(sizes.values()), *sizes.values()])
    needed = f"{least / SHARE / USABLE / 1e9:.0f} GB"
    raise UserError("--gpu-memory", f"this needs {needed} on each GPU at least; give larger GPUs, or more of them")


def taken(recipe: Recipe, costs: Costs, accumulation: int, world: int) -> int:
    """The bytes on each GPU with this accumulation."""
    return memory(with_optim(recipe, accumulation=accumulation), costs, world).total


def divisors(number: int) -> list[int]:
    """The divisors of a number, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]


def savings(data: Data, gpus: int) -> Iterator[Data]:
    """The recipe as it is, then with one means of saving memory after another, each beside those before it."""
    kept = copy.deepcopy(data)
    yield kept
    for key, value in (
        ("memory.offload_text_encoders", data["model"]["family"] != "sit" and "embeddings" not in data.get("data", {})),
        ("optim.zero_stage", 2 if gpus > 1 else 0),
        ("optim.eight_bit", True),
        ("memory.quantize", "nf4" if "generator_lora" in data["model"] else None),
    ):
        section, name = key.split(".")
        if value and not kept[section].get(name):
            kept = copy.deepcopy(kept)
            kept[section][name] = value
            yield kept


def text(data: Data, base: str, plan: Plan) -> str:
    """The recipe as YAML under comments on where it is from, what it needs, and what it takes."""
    optim, extras = data["optim"], []
    extras += ["eight-bit"] if optim.get("eight_bit") else []
    extras += ["bitsandbytes"] if data["memory"].get("quantize") == "nf4" else []
    install = f", pip install dmdr-train[{','.join(extras)}]" if extras else ""
    comments = [
        f"Written by dmdr-train init from the built-in recipe {base},",
        f"whose comments say more: dmdr-train recipes show {base}",
        "",
        f"Needs:    {described(plan)}{install}, and the files that are named below.",
        "Takes:    planned, not measured:",
        *(f"          {line}" for line in short_lines(plan)),
    ]
    head = "\n".join(f"# {line}".rstrip() for line in comments)
    return f"{head}\n\n{yaml.dump(data, Dumper=Plain, sort_keys=False, default_flow_style=None, width=110)}"


def described(plan: Plan) -> str:
    """The GPUs of a plan, with the memory that it counts on."""
    return f"{plan.gpus} x {plan.gpu.name} with {plan.capacity / USABLE / 1e9:.0f} GB"


class Plain(yaml.SafeDumper):
    """YAML without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
