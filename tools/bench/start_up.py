"""The seconds until a command answers, against a Python that imports torch alone.

    python tools/bench start-up

Every command is a process of its own; the operating system has read its files before.
"""

import subprocess
import sys

from bench.common import fastest, options_of, print_table

BASE = "import torch"
TRAIN = "from dmdr_train.cli import main; main({})"
COMMANDS = {
    BASE: "import torch",
    "dmdr-train --help": TRAIN.format(["--help"]),
    "dmdr-train, a mistake in a recipe": TRAIN.format(["plan", "demo", "optim.lr=1"]),
    "dmdr-train plan demo": TRAIN.format(["plan", "demo"]),
    "dmdr-score --help": "from dmdr_rewards.cli import main; main(['--help'])",
}


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    seconds = fastest({name: lambda code=code: run(code) for name, code in COMMANDS.items()}, options.repeats)
    print_table(["command", "s", "ratio"], [[name, found, found / seconds[BASE]] for name, found in seconds.items()])


if __name__ == "__main__":
    main()
