"""Several processes: seconds per step under each ZeRO stage, and how long they wait for the slowest.

    python tools/bench scale                 # exact counts of waiting, up to 64 processes
    python tools/bench scale --measured      # also the built-in problem with 1 and 2 processes, ZeRO 0 to 3

Rollouts end at positions that are drawn, so one process makes more predictions than another, and all wait for it at the
update. The counts are expectations over all draws, without any run.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from dmdr_train.planning.straggling import slowest

from bench.common import options_of, print_table

RUN = Path(__file__).resolve().parents[2] / "packages" / "dmdr-train" / "run.py"
WORLDS = (1, 2, 4, 8, 16, 32, 64)


def waiting(steps: int, own: int) -> list[list[object]]:
    """Predictions of the slowest process against the mean, by the number of processes and by positions."""
    mean = own * ((steps - 1) / 2 + 1)
    return [
        [
            world,
            *((slowest(positions, steps, own, world) + own) / mean for positions in ("independent", "stratified")),
        ]
        for world in WORLDS
    ]


def seconds(world: int, stage: int, steps: int) -> float:
    """Steady seconds per step of the built-in problem on this machine's CPUs."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.output={folder}/run", f"run.steps={steps}", f"optim.zero_stage={stage}", "run.device=cpu"]
        overrides += ["tracking.log_every=1", "tracking.samples=null", "run.checkpoint_every=0"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        command = [*launch, str(RUN), "--config", "demo", *overrides]
        subprocess.run(command, check=True, capture_output=True)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steady = [row["steady_seconds_per_step"] for row in map(json.loads, lines) if "steady_seconds_per_step" in row]
        return float(steady[-1])


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="of the grid")
    parser.add_argument("--samples", type=int, default=2, help="of each process")
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--measured-steps", type=int, default=8)
    options = parser.parse_args()
    print(f"Predictions of the slowest process / mean: {options.steps} steps, {options.samples} samples each\n")
    print_table(["processes", "independent", "stratified"], waiting(options.steps, options.samples))
    if options.measured:
        found = {(w, z): seconds(w, z, options.measured_steps) for z in range(4) for w in (1, 2)}
        rows = [[z, found[1, z], found[2, z], found[2, z] / found[1, 0]] for z in range(4)]
        print()
        print_table(["ZeRO", "s, 1 process", "s, 2 processes", "2 processes / 1 with ZeRO 0"], rows)


if __name__ == "__main__":
    main()
