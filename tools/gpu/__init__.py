"""The parts of tools/gpu_check.py. They find this repository's packages even if none is installed."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("dmdr_train") is None:
    sys.path[:0] = [str(path) for path in sorted(Path(__file__).parents[2].glob("packages/*/src"))]
