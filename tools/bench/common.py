"""What the benchmarks share: options, timing in turns, small recipes, and tables."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dmdr_train.recipe.schema import Recipe

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "medium": {"sample_size": 32, "width": 384, "depth": 4, "num_heads": 6},
}
"""Sizes of models, as options of `dmdr_models.tiny`; medium ones have 256 tokens of pictures."""


def options_of(doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def fastest(
    works: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of each work: the least of `repeats` rounds, in which all take turns, after a round that is not timed."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = clock()
            work()
            if turn:
                found[name].append(clock() - start)
    return {name: min(seconds) for name, seconds in found.items()}


def recipe(family: str, size: str, folder: Path, **changes: Any) -> Recipe:
    """A recipe of distribution matching with a model of random weights, which is written into `folder`.

    Args:
        family: `sit`, trained whole, or `sd3`, trained with two adapters on one network.
        size: a name in `SIZES`.
        changes: sections of the recipe.
    """
    from dmdr_models import tiny

    more = {"max_size": 32} if family == "sd3" and size != "tiny" else {}
    getattr(tiny, family)(folder / family, **SIZES[size], **more)
    model: dict[str, Any] = {"family": family, "path": str(folder / family)}
    data = {}
    if family == "sd3":
        (folder / "prompts.txt").write_text("a red cat\na blue dog\n", encoding="utf-8")
        model |= {"max_tokens": 8, "generator_lora": {"rank": 16, "alpha": 16}, "fake_score_lora": {"rank": 16}}
        data = {"prompts": str(folder / "prompts.txt")}
    return Recipe.model_validate(
        {
            "model": model,
            "data": data,
            "rollout": {"steps": 2},
            "objectives": [{"kind": "distribution_matching"}],
            "guidance": {"ratio": 2, "cfg": 4.0},
            "optim": {"batch_size": 4, "generator": {"lr": 1e-5}, "fake_score": {"lr": 1e-5}},
            "run": {"output": str(folder / "run"), "steps": 1000, "device": "cpu"},
            **changes,
        }
    )


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table in Markdown."""
    print("| " + " | ".join(head) + " |\n|" + "---|" + "---:|" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
