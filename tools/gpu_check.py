"""Check and measure dmdr on one GPU of 80 GB: one command, no network, four minutes unless told otherwise.

    python tools/gpu_check.py                          # the first rows, into runs/gpu-check
    python tools/gpu_check.py --budget 1200            # all rows, as far as their durations are known
    python tools/gpu_check.py --only sd35 reward-      # rows whose names begin so
    python tools/gpu_check.py --tiny                   # a rehearsal with tiny models, also on a CPU

The shipped recipes take steps at full size, with random weights that are made on the device. Comparisons (GPU with CPU,
a resumed run with an uninterrupted one, …) use small models. docs/benchmarks.md explains the table. Rows write up to 8
GB into a temporary folder (see TMPDIR), which is removed at the end.

Exit code: 1 if a row has failed or a number is not finite, 2 for a mistake in the command line or without a GPU.
"""

import argparse
import math
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

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
        help="time limit from the start; a row that does not fit into the remaining time is left out (default: 240)",
    )
    found.add_argument("--tiny", action="store_true", help="rehearse with tiny models, on any device")
    found.add_argument(
        "--emulated", action="store_true", help="rehearse with tiny models on an emulated device, see tools/emulated"
    )
    found.add_argument("-o", "--output", type=Path, default=Path("runs/gpu-check"), metavar="FOLDER")
    return found


def seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text}")
    return number


def run(arguments: Sequence[str]) -> int:
    began = time.monotonic()
    options = parser().parse_args(arguments)
    rows = plan.select(options.only)
    if options.list:
        print("\n".join(row.name for row in rows))
        return 0
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise plan.MistakeError(f"--output {options.output}: {error.strerror}; give another folder") from None
    command = shlex.join(["python", "tools/gpu_check.py", *arguments])

    def tell(results: list[plan.Result], environment: dict[str, Any]) -> None:
        table.write(options.output, results, environment, command)
        last = results[-1]
        line = f"{time.monotonic() - began:4.0f} s  {last.name}, {last.took:.1f} s: {table.told(last)}"
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        results = check(
            rows,
            Options(options.tiny or options.emulated, Path(work), options.emulated),
            lambda: options.budget - (time.monotonic() - began),
            tell,
        )
    print((options.output / "gpu-check.md").read_text(encoding="utf-8"), end="")
    return plan.exit_code(results)


def main(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        return run(arguments)
    except plan.MistakeError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: by Ctrl-C; the finished rows are in the table", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
