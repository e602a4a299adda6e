"""Write what the plan says of the shipped recipes: into tests/train/planned.json, and into the recipes' `Takes:` lines.

    python tools/plan_recipes.py            # every recipe for GPUs; some minutes
    python tools/plan_recipes.py NAME ...   # these alone

A test compares the two, and one recipe with a new count.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from dmdr_train.planning.gpus import find_gpu
from dmdr_train.recipe.load import BUILT_IN, load_recipe

PLANNED = Path(__file__).resolve().parents[1] / "tests" / "train" / "planned.json"
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
    plan = make_plan(load_recipe(name), find_gpu(gpu), gpus)
    return {
        "gpu": gpu,
        "gpus": gpus,
        "gib": round(plan.memory.total / 2**30, 1),
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


def main() -> None:
    known = json.loads(PLANNED.read_text(encoding="utf-8")) if PLANNED.exists() else {}
    for name in sys.argv[1:] or names():
        known[name] = planned(name)
        write_header(name, known[name])
        print(name, json.dumps(known[name]), flush=True)
    PLANNED.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
