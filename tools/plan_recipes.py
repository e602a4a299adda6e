"""Write what the plan says of the shipped recipes: tests/train/planned.json, the recipes' `Takes:` lines, and tables.

    python tools/plan_recipes.py            # every recipe for GPUs; some minutes
    python tools/plan_recipes.py NAME ...   # these alone
    python tools/plan_recipes.py --table    # the tables of docs/full_size.md alone, from planned.json; plans nothing

Tests compare lines and tables with planned.json, and count one recipe again.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmdr_train.planning.gpus import find_gpu
from dmdr_train.recipe import shipped
from dmdr_train.recipe.load import BUILT_IN, load_recipe

ROOT = Path(__file__).resolve().parents[1]
PLANNED = ROOT / "tests" / "train" / "planned.json"
PAGE = ROOT / "docs" / "full_size.md"
FAMILIES = {
    "SD3-Medium": "sd3-medium-",
    "SD3.5-Large": "sd35-large-",
    "SDXL": "sdxl-",
    "SiT-XL/2": "sit-xl-2-",
}
"""The headings of the page, and how the names of their recipes begin."""
COLUMNS = {
    "frozen": ("frozen weights", "frozen copies", "gathered weights"),
    "trained": ("trained weights", "gradients", "master weights and optimizer"),
    "texts": ("text encoders",),
    "decoder": ("decoder",),
    "rewards": ("rewards",),
    "activations": ("activations",),
}
"""The columns of memory, and the parts of the plan that each adds up."""
GPUS = {
    "sd35-large-24gb": ("RTX 4090", 1),
    "sd35-large-48gb": ("L40S", 1),
    "sdxl-1step-80gb": ("H100", 1),
    "sd3-medium-rtdmd": ("H200", 8),
    "sit-xl-2-refl": ("H200", 8),
}
"""The GPUs that a recipe is for, and their number; eight H100 for all others."""


def names() -> list[str]:
    """The recipes for GPUs."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml") if not path.stem.startswith("demo"))


def planned(name: str) -> dict[str, Any]:
    """The figures of a recipe's plan."""
    from dmdr_train.planning.plan import make_plan

    gpu, gpus = GPUS.get(name, ("H100", 8))
    recipe = load_recipe(name)
    plan = make_plan(recipe, find_gpu(gpu), gpus)
    parts = recipe.memory.gradient_checkpointing if plan.checkpointing is None else plan.checkpointing
    return {
        "gpu": gpu,
        "gpus": gpus,
        "samples": plan.micro_batch,
        "checkpointed": list(parts),
        "gib": round(plan.memory.total / 2**30, 1),
        "parts": {part: round(size / 2**30, 2) for part, size in plan.memory.parts.items() if size},
        "seconds": [float(f"{stage.seconds:.3g}") for stage in plan.stages],
        "hours": float(f"{plan.hours:.2g}"),
        "fits": plan.fits,
    }


def takes(name: str, figures: dict[str, Any]) -> str:
    """The lines `Takes:` of a recipe."""
    kind = f'"{figures["gpu"]}"' if " " in figures["gpu"] else figures["gpu"]
    where = f"each of {figures['gpus']} {figures['gpu']}" if figures["gpus"] > 1 else f"one {figures['gpu']}"
    seconds = ", then ".join(f"{each:g}" for each in figures["seconds"])
    return (
        f"# Takes:    planned, not measured: {figures['gib']} GiB on {where}, {seconds} s per step, "
        f"{figures['hours']:g} hours;\n"
        f"#           dmdr-train plan {name} --gpus {figures['gpus']} --gpu {kind}\n"
    )


def write_header(name: str, figures: dict[str, Any]) -> None:
    """Replace the lines `Takes:` in a recipe."""
    path = BUILT_IN / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    lines = takes(name, figures)
    text, found = re.subn(r"^# Takes:.*\n(?:#  .*\n)*", lambda _: lines, text, count=1, flags=re.MULTILINE)
    if not found:
        raise SystemExit(f"{path}: has no line '# Takes:'")
    path.write_text(text, encoding="utf-8")


def tables(known: dict[str, Any]) -> str:
    """The tables of docs/full_size.md: for each family what its recipes train, what they take, and memory by part."""
    parts = []
    for family, prefix in FAMILIES.items():
        own = {name: known[name] for name in sorted(known) if name.startswith(prefix)}
        short, heads = {name: f"`{name.removeprefix(prefix)}`" for name in own}, f"`{prefix}…`"
        about = [[f"`{name}`", trains(name), f"{own[name]['gpus']} {own[name]['gpu']}"] for name in own]
        parts += [f"## {family}", table(["recipe", "trains", "GPUs"], about)]
        parts += [table([heads, *TAKES], [[short[name], *takes_row(own[name])] for name in own])]
        parts += ["GiB on each GPU, by part:"]
        parts += [table([heads, *COLUMNS], [[short[name], *memory_row(own[name])] for name in own])]
    return "\n\n".join(parts)


def trains(name: str) -> str:
    """The first sentence of a recipe's comments, without the name of the model."""
    about = re.split(r"(?<=[\w)])\.(?= |$)", shipped.about(shipped.source(name)))[0]
    return re.sub(r"^(Stable Diffusion [\d.]+ \w+|SDXL|SiT-XL/2) (at|to) ", "", about)


TAKES = ("at once", "recomputed", "GiB", "s per step", "hours", "GPU hours")


def takes_row(figures: dict[str, Any]) -> list[str]:
    """What a recipe takes, under the columns `TAKES`."""
    recomputed = ", ".join(f"`{part}`" for part in figures["checkpointed"]) or "none"
    seconds = ", then ".join(f"{each:g}" for each in figures["seconds"])
    gpu_hours = float(f"{figures['hours'] * figures['gpus']:.2g}")
    room = [f"{figures['samples']}", recomputed, f"{figures['gib']:.1f}"]
    return [*room, seconds, f"{figures['hours']:g}", f"{gpu_hours:g}"]


def memory_row(figures: dict[str, Any]) -> list[str]:
    """The parts of a recipe's memory in GiB, under the columns `COLUMNS`."""
    sums = [sum(figures["parts"].get(part, 0) for part in parts) for parts in COLUMNS.values()]
    return [f"{size:.1f}" if size else "–" for size in sums]


def table(heads: Sequence[str], rows: list[list[str]]) -> str:
    """A table of Markdown; columns of numbers are aligned to the right."""
    numbers = [all(re.fullmatch(r"[\d.–]+", row[i]) for row in rows) for i in range(len(heads))]
    lines = [heads, ["---:" if number else "---" for number in numbers], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(known: dict[str, Any]) -> None:
    """Replace the tables of docs/full_size.md: all from the first of their headings on."""
    text = PAGE.read_text(encoding="utf-8")
    before = text[: text.index(f"## {next(iter(FAMILIES))}")]
    PAGE.write_text(f"{before}{tables(known)}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="NAME", help="recipes to plan (default: all)")
    parser.add_argument("--table", action="store_true", help="plan nothing, write the tables of docs/full_size.md")
    options = parser.parse_args()
    known = json.loads(PLANNED.read_text(encoding="utf-8")) if PLANNED.exists() else {}
    for name in [] if options.table else options.recipes or names():
        known[name] = planned(name)
        write_header(name, known[name])
        print(name, json.dumps(known[name]), flush=True)
    PLANNED.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_page(known)


if __name__ == "__main__":
    main()
