"""Check dmdr on one GPU of 80 GB, and measure it: one command, no network, at most four minutes.

    python tools/gpu_check.py                          # all rows, into runs/gpu-check
    python tools/gpu_check.py --only sd35 reward-      # those whose names begin so
    python tools/gpu_check.py --tiny                   # a rehearsal with tiny models, on a CPU too

The shipped recipes take their steps at full size, with random weights that are made on the device; what is compared
(GPU and CPU, a resumed run and a whole one, …) is compared on small models. docs/benchmarks.md explains the table. Rows
write up to 8 GB into the folder for temporary files (TMPDIR), which is emptied at the end.

Exit code: 1 where a row has failed or a number is not finite, 2 for a mistake in the command line or without a GPU.
"""

import time

BEGAN = time.monotonic()

import argparse
import importlib.util
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("dmdr_train") is None:
    sys.path[:0] = [str(path) for path in sorted(ROOT.glob("packages/*/src"))]

from gpu import plan, table
from gpu.check import check
from gpu.worker import Options


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise plan.MistakeError(f"{message}; see --help")


def parser() -> Parser:
    found = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    found.add_argument("--only", nargs="+", default=[], metavar="ROW", help="names of rows, or their beginnings")
    found.add_argument(
        "--budget",
        type=seconds,
        default=240.0,
        metavar="SECONDS",
        help="from the start of the program; a row that does not fit into the rest is left out (default: 240)",
    )
    found.add_argument("--tiny", action="store_true", help="rehearse with tiny models, on whatever device is there")
    found.add_argument("-o", "--output", type=Path, default=Path("runs/gpu-check"), metavar="FOLDER")
    return found


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text}")
    return number


def run(arguments: Sequence[str] | None, began: float) -> int:
    options = parser().parse_args(arguments)
    rows = plan.select(options.only)
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise plan.MistakeError(f"--output {options.output}: {error.strerror}; give another folder") from None
    command = shlex.join(["python", "tools/gpu_check.py", *(sys.argv[1:] if arguments is None else arguments)])

    def tell(results: list[plan.Result], environment: dict[str, Any]) -> None:
        table.write(options.output, results, environment, command)
        print(f"{time.monotonic() - began:4.0f} s  {results[-1].name}, {results[-1].took:.1f} s: {table.told(results[-1])}", file=sys.stderr)
        sys.stderr.flush()

    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        results = check(
            rows,
            Options(options.tiny, Path(work)),
            lambda: options.budget - (time.monotonic() - began),
            tell,
        )
    print((options.output / "gpu-check.md").read_text(encoding="utf-8"), end="")
    return plan.exit_code(results)


def main(arguments: Sequence[str] | None = None, began: float | None = None) -> int:
    """Carry out a command line, and return its exit code.

    Args:
        began: on `time.monotonic`, from when the budget counts; None: now.
    """
    try:
        return run(arguments, time.monotonic() if began is None else began)
    except plan.MistakeError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(began=BEGAN))
