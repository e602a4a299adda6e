"""Run one benchmark: `python tools/bench NAME [options]`, with --help for what it measures and its options."""

import importlib
import sys
from pathlib import Path

NAMES = ("step", "schedule", "scale", "memory", "start_up", "losses", "rewards", "tiny_rewards")


def main() -> None:
    name = sys.argv[1].replace("-", "_") if len(sys.argv) > 1 else ""
    if name not in NAMES:
        print(f"usage: python tools/bench {{{','.join(NAMES)}}} [options]", file=sys.stderr)
        raise SystemExit(2)
    sys.argv[:2] = [f"bench {name}"]
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    importlib.import_module(f"bench.{name}").main()


if __name__ == "__main__":
    main()
