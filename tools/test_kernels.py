"""Run the tests under each choice of CPU kernels of this machine; print a table, exit with 1 if a test fails.

    python tools/test_kernels.py                                    # tests marked `bits`, under all settings
    python tools/test_kernels.py --only intel,any tests/models -x   # other tests, with options of pytest
    python tools/test_kernels.py --list                             # the settings, and why some are left out

`kernels.py` defines the settings; `any` uses the plugin `any_kernels.py`. The output of each run goes to
OUTPUT/SETTING-THREADS.log.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from kernels import Setting, settings

ROOT = Path(__file__).parents[1]
SHOWN = 3  # names of failed tests


def run(setting: Setting, threads: str, tests: list[str], output: Path) -> tuple[str, bool]:
    """Run the tests; return a row of the table, and whether all passed."""
    name = f"{setting.name}-{threads}"
    report, log = output / f"{name}.xml", output / f"{name}.log"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    report.unlink(missing_ok=True)
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        variables = {**os.environ, "OMP_NUM_THREADS": threads, **setting.variables}
        done = subprocess.run(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - start
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    first = [f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}" for case in failed[:SHOWN]]
    if not failed and done.returncode:
        first = [f"pytest ended with {done.returncode}, see {log}"]
    cells = (setting.name, threads, len(cases) - len(failed), len(failed), f"{seconds:.0f}", "<br>".join(first))
    return f"| {' | '.join(map(str, cells))} |", done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,…", help="settings (default: all that this machine can use)")
    parser.add_argument(
        "--threads", default="1,2", metavar="N,…", help="numbers of threads for each setting (default: 1,2)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/kernels"), help="folder for logs")
    parser.add_argument("--list", action="store_true", help="print the settings and stop")
    parser.add_argument("tests", nargs=argparse.REMAINDER, help="arguments for pytest (default: -m bits)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        every = settings(Path(folder))
        if options.only and (unknown := set(options.only.split(",")) - {each.name for each in every}):
            parser.error(f"--only: unknown {', '.join(sorted(unknown))}; valid are {', '.join(e.name for e in every)}")
        chosen = [each for each in every if not options.only or each.name in options.only.split(",")]
        if options.list:
            for each in chosen:
                told = " ".join(f"{name}={value}" for name, value in each.variables.items())
                print(f"{each.name:16} {'left out: ' + each.left_out if each.left_out else told}")
            return 0

        import torch

        print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor()}\n")
        print("| setting | threads | passed | failed | seconds | first failures |\n|---|---:|---:|---:|---:|---|")
        well = True
        for each in chosen:
            for threads in [] if each.left_out else options.threads.split(","):
                row, passed = run(each, threads, options.tests or ["-m", "bits"], options.output.absolute())
                print(row, flush=True)
                well &= passed
        for each in chosen:
            if each.left_out:
                print(f"\n{each.name} is left out: {each.left_out}")
    return 0 if well else 1


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
