"""Kill and stop runs, damage their checkpoints and fill their disks; compare their results with an undisturbed run.

    python tools/soak.py                                               # a SiT, one process
    python tools/soak.py --family sd3                                  # or sdxl: two adapters, distribution matching
    python tools/soak.py --processes 2 optim.zero_stage=2              # two processes; a fault hits one or both
    python tools/soak.py --start torchrun --processes 2 --kills 5      # with a launcher; or deepspeed, or python
    python tools/soak.py --output /shared/soak                         # on another file system

The tool makes tiny models with random weights and first trains them without faults. Then it starts runs of the same
recipe, causes one fault after the other, and restarts each run with run.resume=auto until it is done; it starts new
runs until all faults are used. It compares all results with the undisturbed run, bit for bit: the last checkpoint with
the state of the optimizers, metrics except times, samples, scores, summary.md and exported student.

A fault waits for a random step of the run and a random part of this step, or for the write of a checkpoint. --seed
determines the steps; the moments inside a step depend on the machine and differ each time. The files that a fault
leaves show where it fell: if a checkpoint still has its hidden name, the process died while writing it.

With --start fork, a server with a single thread that has imported torch and DeepSpeed forks a process for each rank,
which does the same as run.py. This saves only the seconds of the imports: kill -9 ends such a process like any other.
Disks are filled on small separate file systems. Only root can mount these; without root these faults are left out.

The exit code is 1 if anything differs, or if a run did not end or resume as expected.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from dmdr_train.checkpoint.find import checkpoints_in
from dmdr_train.checkpoint.manifest import MANIFEST
from dmdr_train.distributed.deepspeed_internals import saved_types
from dmdr_train.distributed.run_lock import LOCK
from dmdr_train.distributed.signals import STOPPING
from dmdr_train.evaluation.scores import read_scores
from dmdr_train.recipe.load import load_recipe
from dmdr_train.recipe.schema import Recipe
from dmdr_train.tracking.metrics_file import METRICS, read_metrics
from soak_faults import (
    DAMAGES,
    Damage,
    Fault,
    FullDisk,
    FullLogs,
    Hang,
    Kill,
    KillWriting,
    Pace,
    SecondRun,
    Signal,
    can_mount,
    small_disks,
    undamaged,
    unfinished,
)
from soak_starts import IMPORTS, OUT, SERVER, Attempt, Forked, Launched

FULL = "the disk full"
WRITING = "inside a checkpoint's write"
RECIPE: dict[str, Any] = {
    "model": {"fake_score_lora": {"rank": 2, "alpha": 2}},
    "objectives": [{"kind": "distribution_matching"}],
    "guidance": {"ratio": 2, "cfg": 1.5},
    "optim": {
        "batch_size": 4,
        "generator": {"lr": 1e-3, "eps": 1e-4, "schedule": "cosine"},
        "fake_score": {"lr": 1e-3, "eps": 1e-4},
        "ema": 0.9,
    },
    "run": {"output": OUT, "steps": 12, "device": "cpu", "checkpoint_every": 2, "keep_last": 3, "timeout": 15},
    "tracking": {"log_every": 1, "tensorboard": False, "samples": {"count": 2, "every": 4}},
}


def write_recipe(family: str, folder: Path) -> None:
    """Write tiny models and a recipe.yaml that trains them; a SiT has two stages and evaluations."""
    from dmdr_models import tiny

    recipe = json.loads(json.dumps(RECIPE))
    recipe["model"] |= {"family": family, "path": str(getattr(tiny, family)(folder / family))}
    if family == "sit":
        classifier = str(tiny.classifier(folder / "classifier"))
        reward = {"name": "class-label", "checkpoint": classifier}
        recipe["objectives"].append({"kind": "refl", "weight": "auto", "ratio": 0.3, "start": 6, "reward": reward})
        evaluation = {"classifier": classifier, "reference": "shapes", "pictures": 100, "teacher_steps": [1]}
        recipe["tracking"]["evaluation"] = {**evaluation, "every": 4}
    else:
        (folder / "prompts.txt").write_text("a cat\na dog in a hat\ntwo red cubes\n", encoding="utf-8")
        recipe["data"] = {"prompts": str(folder / "prompts.txt")}
        recipe["model"]["generator_lora"] = {"rank": 2, "alpha": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


# -- the results that two runs must have in common


def contents(run: Path) -> dict[str, str]:
    """Return the sha256 of the contents of every file that two equal runs must share, by name.

    Only the last checkpoint is compared, since an interrupted run keeps other ones; its waiting rows are left out, and
    so is report.html, which says how long the training took.
    """
    last = checkpoints_in(run / "checkpoints")[-1]
    out = (run / LOCK, run / "report.html", last / METRICS)
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path not in out]
    files = [path for path in files if last in path.parents or last.parent not in path.parents]
    return {str(path.relative_to(run)): hashlib.sha256(held(path)).hexdigest() for path in files}


def held(path: Path) -> bytes:
    """Return a file's contents without times, the order of scores, and the encoding of pickles and headers."""
    if path.name == METRICS:
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(path.parent)]
        return json.dumps(rows).encode()
    if path.name == "evaluation.json":
        return json.dumps(json.loads(path.read_bytes()), sort_keys=True).encode()
    if path.suffix == ".pt":
        with torch.serialization.safe_globals(saved_types()):
            return b"".join(values(torch.load(path, weights_only=True)))
    if path.suffix == ".safetensors":  # the order of texts in its header is arbitrary
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        return json.dumps(json.loads(content[8:start]), sort_keys=True).encode() + content[start:]
    if path.name == MANIFEST:
        manifest = json.loads(path.read_bytes())
        manifest["files"] = sorted(manifest["files"].keys() - {METRICS})
        del manifest["sha256"]
        return json.dumps(manifest).encode()
    return path.read_bytes()


def values(node: Any) -> Iterator[bytes]:
    """Yield everything in a loaded pickle, in order."""
    if isinstance(node, torch.Tensor):
        yield f"{node.dtype} {tuple(node.shape)}".encode()
        yield node.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(node, dict | list | tuple):
        for part in itertools.chain.from_iterable(node.items()) if isinstance(node, dict) else node:
            yield from values(part)
    else:
        yield repr(vars(node) if hasattr(node, "__dict__") else node).encode()


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Return the files that only one of two runs has, or that differ."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


# -- the soak


@dataclass(frozen=True)
class Event:
    """A fault that has happened: its run, its place, and its consequences."""

    fault: str
    kind: str
    run: str
    where: str
    codes: list[int | None]
    goes_on: bool


class Soak:
    """Start runs and cause faults in them until no faults are left.

    Args:
        folder: a new folder, for the runs and their logs.
        settings: the recipe of the runs.
        start: called as `start(run, log)` to start a run.
    """

    def __init__(self, folder: Path, settings: Recipe, start: Callable[[Path, Path], Attempt]):
        self.folder, self.settings, self.start = folder, settings, start
        self.events: list[Event] = []
        self.complaints: dict[str, list[str]] = {}
        self.expected: dict[str, str] = {}
        self.restarts = 0
        (folder / "logs").mkdir()

    def undisturbed(self) -> Pace:
        """Train the run without faults, whose results the others must equal."""
        run, clock = self.settings.run, [time.monotonic()]
        attempt = self.attempt("undisturbed", 0)
        for until in (attempt.begun, lambda: attempt.logged() == run.steps, lambda: False):
            attempt.wait(until)
            clock.append(time.monotonic())
        check_ended(attempt, attempt.codes())
        start, steps, rest = (after - before for before, after in itertools.pairwise(clock))
        self.expected = contents(attempt.out)
        pauses = [row["checkpoint_seconds"] for row in read_metrics(attempt.out)]
        write = statistics.median(filter(None, pauses))
        return Pace(start, steps / run.steps, rest, write, run.steps, run.checkpoint_every, run.timeout)

    def outlive(self, faults: list[Fault], place: Callable[[Path], AbstractContextManager[None]] = nullcontext) -> None:
        """Cause all faults, beginning with the last, in as many runs as needed; `place` prepares each run's folder."""
        while faults:
            name = f"run-{len(self.complaints) + 1}"
            self.complaints[name] = []
            with place(self.folder / name / OUT):
                self.one_run(name, faults)
                found = contents(self.folder / name / OUT)
            self.complaints[name] += [f"{file} differs" for file in differences(self.expected, found)]

    def one_run(self, name: str, faults: list[Fault]) -> None:
        """Start and restart a run until it is done; remove each fault that has happened from the list."""
        damaged: Path | None = None
        for number in itertools.count():
            attempt = self.attempt(name, number)
            before = undamaged(attempt)
            fault = faults[-1] if faults else None
            step = int(before[-1].name.removeprefix("step-")) if before else 0
            struck = fault is not None and fault.moment(attempt, step)
            if fault and struck:
                fault.strike(attempt)
            codes = attempt.end()
            if attempt.begun():
                self.complaints[name] += complaints(attempt, before[-1:], damaged)
                damaged = None
            done = set(codes) == {0}
            if not fault or not struck or (done and fault.code != 0):
                return check_ended(attempt, codes)
            wrong = "left processes behind" if attempt.outlived else ""
            if isinstance(attempt, Forked):  # a launcher returns codes of its own
                wrong = wrong or fault.wrong(attempt, codes)
            if wrong:
                self.complaints[name].append(f"{attempt.log} {wrong} after {fault.name}")
            left = fault.left(attempt, where(attempt, self.settings))
            if left:
                faults.pop()
                damaged = left.damaged or damaged
                self.events.append(Event(fault.name, fault.kind, name, left.told, codes, bool(undamaged(attempt))))
                print(f"{attempt.log.stem}: {fault.name}: {left.told}, {codes}", file=sys.stderr, flush=True)
            if done:
                return None

    def attempt(self, name: str, number: int) -> Attempt:
        (self.folder / name).mkdir(exist_ok=True)
        self.restarts += number > 0
        return self.start(self.folder / name, self.folder / "logs" / f"{name}-{number:02d}.log")

    def counts(self) -> str:
        """Return a row with the number of faults of each kind, restarts and complaints."""
        kinds = Counter(event.kind for event in self.events)
        writing = sum(event.where == WRITING for event in self.events if event.kind == Kill.kind)
        cells = {Kill.kind: kinds[Kill.kind], "of these inside a write": writing}
        cells |= {each.kind: kinds[each.kind] for each in (Signal, Damage, Hang, FullDisk, SecondRun)}
        cells |= {"restarts": self.restarts, "complaints": sum(map(len, self.complaints.values()))}
        return "\n".join(f"| {' | '.join(row)} |" for row in (cells, ["---:"] * len(cells), map(str, cells.values())))

    def table(self) -> str:
        """Return a table with a row for each fault."""
        lines = ["| fault | times | where it fell | went on from | exit codes | equal |", "|---|---:|---|---|---|---|"]
        for fault in sorted({event.fault for event in self.events}):
            events = [event for event in self.events if event.fault == fault]
            cells = [
                str(len(events)),
                counted(event.where for event in events),
                counted("a checkpoint" if event.goes_on else "the start" for event in events),
                counted(str(code) for event in events for code in event.codes),
                "no" if any(self.complaints[event.run] for event in events) else "yes",
            ]
            lines.append(f"| {fault} | {' | '.join(cells)} |")
        return "\n".join(lines)


def counted(words: Iterable[str]) -> str:
    return ", ".join(f"{word}: {count}" for word, count in Counter(words).most_common())


def check_ended(attempt: Attempt, codes: list[int | None]) -> None:
    """Exit with an error if a run failed although no fault hit it."""
    if set(codes) != {0}:
        sys.exit(f"{attempt.log} ended with {codes} by itself:\n{attempt.log.read_text()[-2000:]}")


def complaints(attempt: Attempt, newest: list[Path], damaged: Path | None) -> list[str]:
    """Return what is wrong: the attempt did not resume from `newest`, or did not name the damaged file."""
    text, found = attempt.log.read_text(), []
    wanted = [str(path.relative_to(attempt.run)) for path in newest]
    if re.findall("^resuming from (.*)$", text, re.M) != wanted:
        found.append(f"{attempt.log} does not resume from {wanted or 'the start'}")
    if damaged and not re.search(rf"{re.escape(str(damaged))} is (damaged|missing); falling back", text):
        found.append(f"{attempt.log} does not name {damaged}")
    return found


def where(attempt: Attempt, settings: Recipe) -> str:
    """Return where a run was when it died, judged by the files that it left."""
    found = checkpoints_in(attempt.out / "checkpoints")
    step = int(found[-1].name.removeprefix("step-")) if found else 0
    evaluation = settings.tracking.evaluation
    due = {stage for stage, end in settings.stages.items() if end == step} if evaluation else set()
    if evaluation and evaluation.every and step % evaluation.every == 0:
        due.add(f"step-{step}")
    if not attempt.begun():
        return "before it had begun"
    if unfinished(attempt):
        return WRITING
    if unfinished(attempt, "removed"):
        return "inside a checkpoint's removal"
    if not found:
        return "before the first checkpoint"
    if step == settings.run.steps:
        return "after the last checkpoint"
    if due - read_scores(attempt.out).keys() and read_metrics(attempt.out)[-1]["step"] == step:
        return "in an evaluation"
    return "between checkpoints"


# -- the command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["sit", "sd3", "sdxl"], default="sit")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--start", choices=["fork", "python", "torchrun", "deepspeed"], default="fork")
    parser.add_argument(
        "--kills", type=int, default=25, help="number of kills, half of them at checkpoints' writes (default: 25)"
    )
    parser.add_argument("--signals", type=int, default=3, help="number for each signal (default: 3)")
    parser.add_argument("--damages", type=int, default=2, help="number for each kind (default: 2)")
    parser.add_argument("--hangs", type=int, default=2, help="number of stops of one of several processes (default: 2)")
    parser.add_argument(
        "--second-runs", type=int, default=2, help="number of second runs in the same folder (default: 2)"
    )
    parser.add_argument(
        "--full-disks", type=int, default=3, help="number for checkpoints, and again for logs (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--output", type=Path, help="a new folder that keeps the runs and their logs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings for every run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        soak = soaked(options, (options.output or Path(folder) / "soak").absolute())
    runs = f"{len(soak.complaints)} runs, of each {len(soak.expected)} files compared"
    print(f"{soak.table()}\n\n{soak.counts()}\n\n{runs}")
    if options.full_disks and FULL not in {event.fault for event in soak.events}:
        print("no disk was filled, since none can be mounted here")
    for name, lines in soak.complaints.items():
        for line in lines:
            print(f"{name}: {line}")
    return int(any(soak.complaints.values()))


def soaked(options: argparse.Namespace, folder: Path) -> Soak:
    """Run a command line in a new folder."""
    (folder / "models").mkdir(parents=True)
    SERVER.set_forkserver_preload([*IMPORTS, f"dmdr_models.{options.family}.family"])
    making = SERVER.Process(target=write_recipe, args=(options.family, folder / "models"))
    making.start()
    making.join()  # the server has now imported everything
    recipe = str(folder / "models/recipe.yaml")
    asked = ["--config", recipe, "run.resume=auto", *options.overrides]

    def start(run: Path, log: Path) -> Attempt:
        if options.start == "fork":
            return Forked(run, log, asked, options.processes)
        return Launched(run, log, asked, options.processes, options.start)

    soak = Soak(folder, load_recipe(recipe, options.overrides), start)
    pace, draws = soak.undisturbed(), random.Random(options.seed)
    kills = (Kill("kill -9", pace, draws), KillWriting("kill -9, aimed at a write", pace, draws))
    faults: list[Fault] = [kills[number % 2] for number in range(options.kills)]
    faults += [Signal(number.name, pace, draws) for number in STOPPING for _ in range(options.signals)]
    faults += [Damage(name, pace, draws) for name in DAMAGES for _ in range(options.damages)]
    faults += [SecondRun("a second run in the folder", pace, draws, start) for _ in range(options.second_runs)]
    if options.processes > 1 and options.start == "fork":
        faults += [Hang("one process stands still", pace, draws) for _ in range(options.hangs)]
    draws.shuffle(faults)
    soak.outlive(faults)
    if options.full_disks and can_mount(folder / "disk"):
        full = FullDisk(FULL, pace, draws), FullLogs("the log's disk full", pace, draws)
        soak.outlive([fault for fault in full for _ in range(options.full_disks)], small_disks)
    return soak


if __name__ == "__main__":
    sys.exit(main())
