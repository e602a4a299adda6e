"""Give arbitrary and mutated input to every reader of users' files; it must be read or refused in one line.

    python tools/fuzz.py [TARGET …] [--examples 1000] [--seed 0]

An exception other than the reader's own error is a failure. An endless run is one, too, and so is a change to a file
outside the folder of the input. Needs hypothesis.
"""

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fuzzing.examples import Target
from fuzzing.model_folders import model
from fuzzing.scoring_files import scores, tables
from fuzzing.training_files import checkpoint, embeddings, opened_prompts, override, pairs, prompts, recipe, run
from hypothesis import HealthCheck, Phase, given, seed, settings

TARGETS: dict[str, Callable[[], Target]] = {
    "recipe": recipe,
    "override": override,
    "prompts": prompts,
    "opened-prompts": opened_prompts,
    "embeddings": embeddings,
    "pairs": pairs,
    "run": run,
    "checkpoint": checkpoint,
    "model": model,
    "scores": scores,
    "tables": tables,
}


def fuzz(name: str, examples: int, number: int | None = None) -> Counter[str]:
    """Run a target on a number of examples; return how many were read and how many were refused.

    Args:
        number: the seed; without a seed the examples are the same each time.
    """
    from dmdr_rewards.base import errors as score_errors
    from dmdr_train.base import errors as train_errors

    refusals = (train_errors.UserError, score_errors.UserError)
    strategy, read = TARGETS[name]()
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=number is None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def try_it(example: Any) -> None:
        with tempfile.TemporaryDirectory() as root:
            folder, bystander = Path(root) / "in" / "side", Path(root) / "outside"
            folder.mkdir(parents=True)
            bystander.write_text("untouched")
            try:
                read(example, folder)
                outcomes["read"] += 1
            except refusals:
                outcomes["refused"] += 1
            assert bystander.read_text() == "untouched"

    (try_it if number is None else seed(number)(try_it))()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"any of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--examples", type=int, default=1000, help="number for each target (default: 1000)")
    parser.add_argument("--seed", type=int, help="seed (default: a new one each time)")
    options = parser.parse_args()
    number = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    for name in options.targets or TARGETS:
        if name not in TARGETS:
            parser.error(f"no target {name}; valid are {', '.join(TARGETS)}")
        outcomes = fuzz(name, options.examples, number)
        print(f"{name}: {outcomes['read']} read, {outcomes['refused']} refused in one line, seed {number}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
