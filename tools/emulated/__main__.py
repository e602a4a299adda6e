"""`python -m emulated PROGRAM …`, or `-m MODULE …`: run a Python program with the emulated device in place of a GPU.

DeepSpeed finds the device, so dmdr-train trains on it. For dmdr-generate and dmdr-score use `--device emulated`.
"""

import runpy
import sys

import emulated


def main(program: list[str]) -> None:
    """Install the emulated device and run the program in this process."""
    emulated.replace_gpu()
    is_module = program[0] == "-m"
    sys.argv = program[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


main(sys.argv[1:])
